# SPDX-License-Identifier: Apache-2.0
"""Batch norm, ReLU and max-pool as one operator, forward and backward: the stem of a ResNet behind
its convolution.

The map between batch norm and pooling is never stored. Saved for backward are ``x``, vectors, and
one byte for each pooled value.

Where :func:`has_max_pool_kernel` is false the twin in :mod:`fastresnet.ops.reference` runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from . import reference
from .bn_act import (
    _channels_last,
    _fake_gradients,
    _no_double_backward,
    _vectors,
    as_kernels_take,
    has_kernel,
)

_LARGEST_KERNEL = 15  # a position in the window is one byte
# The levels whose kernels are faster than torch's pooling behind a fused batch norm.
_LEVELS = ("amx", "avx512_bf16", "avx512", "avx2")


def has_max_pool_kernel(x: Tensor, kernel_size: int, stride: int, padding: int) -> bool:
    """Whether the compiled operator takes ``x`` and such windows, and is meant for this processor:
    a tensor that :func:`fastresnet.ops.has_kernel` accepts, windows of at most 15 x 15."""
    return (
        (x.device.type != "cpu" or _extension.cpu_level in _LEVELS)
        and has_kernel(x)
        and x.numel() // x.shape[1] < 2**31
        and 1 <= kernel_size <= _LARGEST_KERNEL
        and stride >= 1
        and 0 <= 2 * padding <= kernel_size
        and min(x.shape[2:]) + 2 * padding >= kernel_size
    )


def bn_relu_max_pool(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kernel_size: int,
    stride: int,
    padding: int = 0,
    eps: float = 1e-5,
    training: bool,
) -> Tensor:
    """``max_pool2d(relu(bn(x)), kernel_size, stride, padding)``.

    Args:
        x, mean, var, weight, bias, eps, training: as in :func:`fastresnet.ops.bn`.
        kernel_size, stride, padding: of the windows, for both dimensions.

    Returns:
        [N, C, H', W'] in ``x``'s dtype and layout, computed in float32 and rounded once. The
        largest value of a window is found before the rounding; of equal ones the first gets the
        gradient.

    Raises:
        ValueError: a vector has not one value a channel.
    """
    if not has_max_pool_kernel(x, kernel_size, stride, padding):
        return reference.bn_relu_max_pool(
            *(x, mean, var, weight, bias),
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            eps=eps,
            training=training,
        )
    vectors = _vectors(x, mean, var, weight, bias)
    out, _index = torch.ops.fastresnet.bn_relu_max_pool.default(
        x, *vectors, kernel_size, stride, padding, eps, training
    )
    return out


def _setup_context(ctx, inputs, output):
    x, mean, var, weight, _bias, *ctx.rest = inputs
    _out, index = output
    ctx.mark_non_differentiable(index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index, x, mean, var, weight)


def _backward(ctx, grad, _grad_index):
    if grad is None:
        return (None,) * 10
    index, *saved = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.fastresnet.bn_relu_max_pool_backward.default(
        *(_channels_last(grad), _channels_last(index), *as_kernels_take(saved)), *ctx.rest
    )
    return dx, None, None, dweight, dbias, None, None, None, None, None


if _extension.has_schemas:

    @torch.library.register_fake("fastresnet::bn_relu_max_pool")
    def _(x, mean, var, weight, bias, kernel_size, stride, padding, eps, training):
        size = [(side + 2 * padding - kernel_size) // stride + 1 for side in x.shape[2:]]
        layout = {"device": x.device, "memory_format": torch.channels_last}
        shape = (*x.shape[:2], *size)
        out = torch.empty(shape, dtype=x.dtype, **layout)
        return out, torch.empty(shape, dtype=torch.uint8, **layout)

    @torch.library.register_fake("fastresnet::bn_relu_max_pool_backward")
    def _(grad, index, x, mean, var, weight, kernel_size, stride, padding, eps, training):
        return _fake_gradients(x)

    torch.library.register_autograd(
        "fastresnet::bn_relu_max_pool", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd("fastresnet::bn_relu_max_pool_backward", _no_double_backward)
