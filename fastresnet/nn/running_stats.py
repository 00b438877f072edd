# SPDX-License-Identifier: Apache-2.0
"""What batch norms remember of the batches they have seen, exactly as torch's do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Seen(NamedTuple):
    """A batch norm and the batch that it has just normalised."""

    bn: nn.modules.batchnorm._BatchNorm
    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    count: int  # values a channel


def update_running_stats(batches: Iterable[Seen]) -> None:
    """Moves the running statistics of batch norms towards those of their batches.

    All of them together: calls of torch would cost a block more than the few numbers do. One that
    has normalised several remembers them in turn.
    """
    batches = list(batches)
    if len({seen.bn for seen in batches}) < len(batches):
        for seen in batches:
            update_running_stats([seen])
        return
    counters = [seen.bn.num_batches_tracked for seen in batches]
    counters = [counter for counter in counters if counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    batches = [seen for seen in batches if seen.bn.running_mean is not None]
    if not batches:
        return
    scales = [seen.count / (seen.count - 1) for seen in batches]  # to the unbiased variance
    variances = torch._foreach_mul([seen.var for seen in batches], scales)
    moves: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (bn, mean, *_), var in zip(batches, variances, strict=True):
        moves[_factor(bn)] += [(bn.running_mean, mean), (bn.running_var, var)]
    for factor, pairs in moves.items():
        _move_towards(pairs, factor)


def _factor(bn: nn.modules.batchnorm._BatchNorm) -> float:
    if bn.momentum is not None:
        return bn.momentum
    # A cumulative average.
    return 0.0 if bn.num_batches_tracked is None else 1.0 / float(bn.num_batches_tracked)


def _move_towards(pairs: list[tuple[Tensor, Tensor]], factor: float) -> None:
    alike = [(running, value) for running, value in pairs if running.dtype == value.dtype]
    if alike:
        running, values = zip(*alike, strict=True)
        torch._foreach_lerp_(running, values, factor)
    for running, value in pairs:
        if running.dtype != value.dtype:  # in the wider dtype, rounded once
            wide = torch.promote_types(running.dtype, value.dtype)
            running.copy_(torch.lerp(running.to(wide), value.to(wide), factor))
