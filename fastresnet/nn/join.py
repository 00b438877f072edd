# SPDX-License-Identifier: Apache-2.0
"""What a residual block ends with, as the node behind it knows it: on the CPU to save it instead of
its input (:mod:`fastresnet.nn.residual`), on CUDA to compute it (:mod:`fastresnet.nn.segments`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import Normalized


class Join(NamedTuple):
    """The ReLU of a sum: what a block ends with. Without a shortcut, what a stem ends with."""

    x: Normalized
    shortcut: Normalized | Tensor | None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """The sum's ReLU, and a bit for each value that says whether it is positive (None without
        a shortcut, where the sign of ``x`` tells)."""
        x, shortcut = self
        if shortcut is None:
            return torch.ops.fastresnet.bn_relu.default(*x[:5], x.eps, x.training), None
        if isinstance(shortcut, Tensor):
            return torch.ops.fastresnet.bn_add_relu.default(*x[:5], shortcut, x.eps, x.training)
        return torch.ops.fastresnet.bn_add_bn_relu.default(
            *x[:5], *shortcut[:5], x.eps, shortcut.eps, x.training
        )

    def is_made_of_saved(self, input_is_saved: bool) -> bool:
        """Whether a block's backward keeps all of this, its input or not."""
        return input_is_saved or not isinstance(self.shortcut, Tensor)


# Of a batch norm, beside its tensors: epsilon, and whether its statistics are the batch's.
Settings = tuple[float, bool]


def taken_apart(join: Join) -> tuple[list[Tensor], list[Settings]]:
    """The tensors, as arguments of a node and for ``save_for_backward``, and the settings of each
    batch norm."""
    norms = [part for part in join if isinstance(part, Normalized)]
    tensors = [tensor for norm in norms for tensor in norm[:5]]
    if isinstance(join.shortcut, Tensor):
        tensors.append(join.shortcut)
    return tensors, [norm[5:] for norm in norms]


def put_together(tensors: Sequence[Tensor], settings: Sequence[Settings]) -> Join:
    """The opposite of :func:`taken_apart`."""
    norms = [Normalized(*tensors[5 * i : 5 * i + 5], *rest) for i, rest in enumerate(settings)]
    shortcut = norms[1] if len(norms) == 2 else next(iter(tensors[5:]), None)
    return Join(norms[0], shortcut)
