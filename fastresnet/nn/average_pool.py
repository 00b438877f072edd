# SPDX-License-Identifier: Apache-2.0
"""The average over a map, between a network's last block and its classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .batch_norm import has_hooks, is_transformed


def average_pool(pool: nn.Module, x: Any) -> Any:
    """``pool(x)``, by :func:`fastresnet.ops.global_avg_pool` where that is the same.

    Compilers are left torch's module, which they fuse with what surrounds it.

    Args:
        pool: any module; replaced is ``nn.AdaptiveAvgPool2d(1)`` without hooks.
        x: what it is called with; [N, C, H, W] there.
    """
    if (
        type(pool) is nn.AdaptiveAvgPool2d
        and pool.output_size in (1, (1, 1))
        and not has_hooks(pool)
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not is_transformed(x)
        and ops.has_kernel(x)
    ):
        return ops.global_avg_pool(x)
    return pool(x)
