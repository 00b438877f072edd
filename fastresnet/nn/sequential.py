# SPDX-License-Identifier: Apache-2.0
"""``nn.Sequential`` whose batch norms run fused with what is around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .batch_norm import fused_call, materialize
from .chain import run_chain
from .fold_store import Foldable, forget_folds
from .folding import run_folded
from .stem import pooled_stem

_POOLED = [nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]


class FusedSequential(Foldable, nn.Sequential):
    """An ``nn.Sequential`` that trains convolutions with batch norm and ReLU, and a max-pool behind
    them, on convolutions of our own, and runs any other ``nn.BatchNorm2d`` in one pass with an
    ``nn.ReLU`` that follows it. In inference the batch norm is folded into the convolution.

    The children stay torch's modules at their own indices: keys, hooks, indexing and slicing are
    those of ``nn.Sequential``.
    """

    def forward(self, input: Any) -> Any:
        modules = list(self)
        if torch.is_grad_enabled():
            forget_folds(self)
        while modules:
            input, count, _ = run_chain(modules, input)
            # A subclass that the conversion made has no train() that forgets its folds.
            if count == 0 and isinstance(self, FusedSequential):
                input, count = run_folded(modules, input)
            if count == 0 and [type(module) for module in modules[:3]] == _POOLED:
                input, count = pooled_stem(*modules[:3], input)[0], 3
            elif count == 0:
                input, count = fused_call(modules[0], input), 1
            modules = modules[count:]
        return materialize(input)
