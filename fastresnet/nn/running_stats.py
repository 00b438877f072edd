# SPDX-License-Identifier: Apache-2.0
"""What a batch norm remembers of the batches it has seen, exactly as torch's does."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def update_running_stats(
    bn: nn.modules.batchnorm._BatchNorm, mean: Tensor, var: Tensor, count: int
) -> None:
    """Moves the running statistics towards a batch's.

    Args:
        mean, var: [C], the latter biased.
        count: values a channel.
    """
    factor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # a cumulative average
            factor = 1.0 / float(bn.num_batches_tracked)
    if bn.running_mean is None:
        return
    _move_towards(bn.running_mean, mean, factor)
    _move_towards(bn.running_var, var * (count / (count - 1)), factor)  # kept unbiased


def _move_towards(running: Tensor, value: Tensor, factor: float) -> None:
    if running.dtype == value.dtype:
        running.lerp_(value, factor)
    else:  # in the wider dtype, rounded once
        wide = torch.promote_types(running.dtype, value.dtype)
        running.copy_(torch.lerp(running.to(wide), value.to(wide), factor))
