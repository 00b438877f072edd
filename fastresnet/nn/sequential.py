# SPDX-License-Identifier: Apache-2.0
"""``nn.Sequential`` whose batch norms run fused with the ReLU after them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .batch_norm import fused_call, materialize


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that runs each ``nn.BatchNorm2d`` through the fused operators, in one
    pass with an ``nn.ReLU`` that follows it.

    The children stay torch's modules at their own indices: keys, hooks, indexing and slicing are
    those of ``nn.Sequential``.
    """

    def forward(self, input: Any) -> Any:
        for module in self:
            input = fused_call(module, input)
        return materialize(input)
