# SPDX-License-Identifier: Apache-2.0
"""Convolutions in one pass: the batch norm and ReLU in front of one are computed as its input is
read, the statistics of its output as that is written, and a backward gives the gradients of input,
weight and batch norm together.

These are the parts that a residual block is made of (:mod:`fastresnet.nn.residual` joins them into
one autograd node). They carry no autograd of their own.

Where :func:`has_conv_kernel` is false the twins in :mod:`fastresnet.ops.reference` run; on CUDA the
statistics are those of :mod:`fastresnet.ops.conv_graph`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _extension
from . import choice, conv_graph, reference
from .bn_act import KERNEL_DTYPES, has_kernel, is_kernel_input
from .reference import ConvGradients, Normalized

# The levels whose kernels are the faster convolutions, in every dtype: what the processor has no
# instructions for they compute in float32, where torch's are several times slower.
_LEVELS = ("amx", "avx512_bf16", "avx512", "avx2")

_CHANNEL_BLOCK = 32  # what the kernels compute at a time
_MOST_STRIDE = 4  # kMaxStride of csrc/cpu/conv_params.h


def has_conv_kernel(x: Tensor, weight: Tensor, *, stride: int = 1, groups: int = 1) -> bool:
    """Whether the compiled convolutions take ``x`` and ``weight``, and are meant for this
    processor: a CPU tensor that :func:`fastresnet.ops.has_kernel` accepts, or would with more than
    one value a channel; ``weight`` of float32, bfloat16 or float16, a stride of 4 at most and, if
    there are several groups, as many output as input channels, by groups of 1, 2, 4, 8, 16, 32 or a
    multiple of 32."""
    width = weight.shape[1]
    return (
        (groups == 1 or weight.shape[0] == width * groups)
        and (groups == 1 or width % _CHANNEL_BLOCK == 0 or _CHANNEL_BLOCK % width == 0)
        and stride <= _MOST_STRIDE
        and x.device.type == "cpu"
        and is_kernel_input(x)
        and weight.device == x.device
        and weight.dtype in KERNEL_DTYPES
        and _extension.cpu_level in _LEVELS
    )


def conv_stats(
    x: Tensor | Normalized,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of ``x``, or of ``relu(batch norm)`` of it, and its output's statistics.

    Args:
        x: [N, C, H, W], or the same with the batch norm to apply first.
        weight: [K, C / groups, height, width]; used in the dtype of ``x``.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, the first three
            for both dimensions.

    Returns:
        y [N, K, H', W'] in the dtype of ``x``, channels_last; mean and biased variance of its
        channels, float32 [K].

    Raises:
        ValueError: shapes do not fit each other.
    """
    source = x.x if isinstance(x, Normalized) else x
    if source is x and x.device.type in choice.DEVICES and has_kernel(x):
        filters = weight.to(dtype=x.dtype, memory_format=torch.channels_last)
        geometry = conv_graph.Geometry(stride, padding, dilation, groups)
        return conv_graph.conv_stats(x, filters, geometry)
    compiled = has_conv_kernel(source, weight, stride=stride, groups=groups)
    run = launch_conv_stats if compiled else reference.conv_stats
    return run(x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)


def launch_conv_stats(
    x: Tensor | Normalized,
    weight: Tensor,
    *,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`conv_stats` of what :func:`has_conv_kernel` was asked about before."""
    source, bn = (x.x, x) if isinstance(x, Normalized) else (x, None)
    return torch.ops.fastresnet.conv_stats.default(
        source, *_prologue(bn), weight, stride, padding, dilation, groups
    )


def bn_sums(
    grad: Tensor,
    mask: Tensor | None,
    x: Tensor,
    mean: Tensor,
    residual: Tensor | None = None,
    residual_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sums that the backward of a batch norm begins with.

    Args:
        grad: like ``x``, the gradient behind the batch norm.
        mask: uint8 [N, H, W, C / 8], a bit for each value of ``grad`` that counts; None: all.
        x, mean: the batch norm's input and its mean.
        residual, residual_mean: the same of a second batch norm under the same gradient.

    Returns:
        float64 [2, C], the sums of ``g`` and of ``g * (x - mean)``; the same for the residual, or
        None.
    """
    if not (has_kernel(x) and x.device.type == "cpu"):
        return reference.bn_sums(grad, mask, x, mean, residual, residual_mean)
    sums, residual_sums = torch.ops.fastresnet.bn_sums.default(
        grad, mask, x, mean, residual, residual_mean
    )
    return sums, residual_sums if residual is not None else None


def conv_bn_backward(
    grad: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    y: Normalized,
    x: Tensor | Normalized,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    addend: Tensor | None = None,
    addend_mask: Tensor | None = None,
    wants_dx: bool = True,
) -> ConvGradients:
    """Backward of a convolution and the batch norm behind it.

    Args:
        grad, mask, sums: the gradient behind the batch norm, as in :func:`bn_sums`.
        y: the convolution's output and its batch norm.
        x, weight, stride, padding, dilation, groups: as in :func:`conv_stats`.
        addend: like ``x``, added to its gradient; with ``addend_mask`` only where its bit is set.
            Not together with a batch norm in ``x``.
        wants_dx: whether the gradient of ``x`` is needed.

    Returns:
        The gradients. Where ``x`` has a batch norm, its gradient is the one behind that.
    """
    source = x.x if isinstance(x, Normalized) else x
    compiled = has_conv_kernel(source, weight, stride=stride, groups=groups)
    run = launch_conv_bn_backward if compiled else reference.conv_bn_backward
    return run(
        *(grad, mask, sums, y, x, weight),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        addend=addend,
        addend_mask=addend_mask,
        wants_dx=wants_dx,
    )


def launch_conv_bn_backward(
    grad: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    y: Normalized,
    x: Tensor | Normalized,
    weight: Tensor,
    *,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    addend: Tensor | None = None,
    addend_mask: Tensor | None = None,
    wants_dx: bool = True,
) -> ConvGradients:
    """:func:`conv_bn_backward` of what :func:`has_conv_kernel` was asked about before."""
    source, bn = (x.x, x) if isinstance(x, Normalized) else (x, None)
    dx, dweight, dbn_weight, dbn_bias, x_sums = torch.ops.fastresnet.conv_bn_backward.default(
        *(grad, mask, sums, y.x, y.mean, y.var, y.weight, y.eps, y.training),
        *(source, *_prologue(bn), weight, addend, addend_mask),
        *(stride, padding, dilation, groups, wants_dx),
    )
    return ConvGradients(
        dx if wants_dx else None,
        dweight,
        dbn_weight,
        dbn_bias,
        x_sums if bn is not None and wants_dx else None,
    )


def _prologue(bn: Normalized | None) -> tuple:
    if bn is None:
        return None, None, None, None, 0.0
    return bn.mean, bn.var, bn.weight, bn.bias, bn.eps


def empty_output(
    x: Tensor, weight_size: Sequence[int], stride: int, padding: int, dilation: int
) -> Tensor:
    """An uninitialised tensor like the output of a convolution of ``x``, in channels_last."""
    size = [
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for side, kernel in zip(x.shape[2:], weight_size[2:], strict=True)
    ]
    y = x.new_empty((x.shape[0], weight_size[0], *size))
    return y.contiguous(memory_format=torch.channels_last)


if _extension.has_schemas:

    @torch.library.register_fake("fastresnet::conv_stats")
    def _(x, x_mean, x_var, x_weight, x_bias, x_eps, weight, stride, padding, dilation, *_):
        mean = x.new_empty(weight.shape[0], dtype=torch.float32)
        y = empty_output(x, weight.shape, stride, padding, dilation)
        return y, mean, torch.empty_like(mean)

    @torch.library.register_fake("fastresnet::bn_sums")
    def _(grad, mask, x, mean, residual, residual_mean):
        channels = x.shape[1]
        sums = x.new_empty((2, channels), dtype=torch.float64)
        return sums, x.new_empty((2, 0 if residual is None else channels), dtype=torch.float64)

    @torch.library.register_fake("fastresnet::conv_bn_backward")
    def _(grad, grad_mask, sums, y, mean, var, bn_weight, eps, training, x, x_mean, *rest):
        weight, wants_dx = rest[4], rest[-1]
        dx = torch.empty_like(x, memory_format=torch.channels_last) if wants_dx else x.new_empty(0)
        x_sums = x.shape[1] if wants_dx and x_mean is not None else 0
        vector = x.new_empty(y.shape[1], dtype=torch.float32)
        return (
            *(dx, torch.empty_like(weight), vector, torch.empty_like(vector)),
            x.new_empty((2, x_sums), dtype=torch.float64),
        )
