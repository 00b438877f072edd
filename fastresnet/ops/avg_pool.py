# SPDX-License-Identifier: Apache-2.0
"""The average of each channel over its whole map, which ends a ResNet's convolutions (He et al.,
2015), forward and backward.

The gradient comes in ``channels_last``, where torch's is NCHW and has to be copied before a kernel
of ours can read it.

Where :func:`fastresnet.ops.has_kernel` is false the twin in :mod:`fastresnet.ops.reference` runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _extension
from . import reference
from .bn_act import _channels_last, has_kernel


def global_avg_pool(x: Tensor) -> Tensor:
    """``adaptive_avg_pool2d(x, 1)``.

    Args:
        x: [N, C, H, W].

    Returns:
        [N, C, 1, 1] in ``x``'s dtype, computed in float32 and rounded once.
    """
    if not has_kernel(x):
        return reference.global_avg_pool(x)
    return torch.ops.fastresnet.global_avg_pool.default(x)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.sides = inputs[0].shape[2:]


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.fastresnet.global_avg_pool_backward.default(_channels_last(grad), *ctx.sides)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.fastresnet.global_avg_pool.default(_channels_last(grad)), None, None


if _extension.has_schemas:

    @torch.library.register_fake("fastresnet::global_avg_pool")
    def _(x):
        return x.new_empty((*x.shape[:2], 1, 1))

    @torch.library.register_fake("fastresnet::global_avg_pool_backward")
    def _(grad, height, width):
        shape = (*grad.shape[:2], height, width)
        return torch.empty(
            shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
        )

    torch.library.register_autograd(
        "fastresnet::global_avg_pool", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd("fastresnet::global_avg_pool_backward", _double_backward)
