# SPDX-License-Identifier: Apache-2.0
"""Convolutions on CUDA together with the batch norm beside them, forward and backward.

Each function has two ways to its result, and :mod:`fastresnet.ops.choice` takes the faster: a
graph of cuDNN's whose kernel computes the sums that the batch norm needs as it stores its output,
then a kernel of ours; or torch's convolution, then the kernels of ours that read its output again.
They are the parts of a training step (:mod:`fastresnet.nn.segments` joins them) and carry no
autograd of their own.

On the CPU the graphs run as their twins in :mod:`fastresnet.ops.reference`, and are never chosen:
what is around them can be tried there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _extension
from . import reference
from .choice import choose
from .reference import Normalized

_aten, _ops = torch.ops.aten, torch.ops.fastresnet


class Geometry(NamedTuple):
    """A convolution's arguments, the first three for both dimensions."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1


class NormGradients(NamedTuple):
    """The gradients of a batch norm's input and parameters."""

    x: Tensor  # like the input
    weight: Tensor  # [C]
    bias: Tensor  # [C]


class JoinGradients(NamedTuple):
    """The gradients of ``relu(bn(x) + residual)``, or of that with a batch norm in both branches,
    whose biases then have one gradient."""

    x: Tensor  # like x
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    residual: Tensor  # like x
    residual_weight: Tensor | None  # [C]


def conv_stats(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of ``x`` and its output's statistics.

    Args:
        x: [N, C, H, W], channels_last.
        weight: [K, C / groups, height, width], channels_last, of ``x``'s dtype.

    Returns:
        y [N, K, H', W'], channels_last; mean and biased variance of its channels, float32 [K].
    """
    return choose("conv_stats", _conv_stats_fused, _conv_stats_apart, (x, weight, *geometry))


def _conv_stats_fused(x: Tensor, weight: Tensor, *geometry: int) -> tuple[Tensor, ...]:
    y, sums = _ops.conv_sums.default(x, weight, *geometry)
    return y, *_ops.bn_stats_of_sums.default(y, sums)


def _conv_stats_apart(x: Tensor, weight: Tensor, *geometry: int) -> tuple[Tensor, ...]:
    stride, padding, dilation, groups = geometry
    sides = ([stride] * 2, [padding] * 2, [dilation] * 2)
    y = _aten.convolution.default(x, weight, None, *sides, False, [0, 0], groups)
    y = y.contiguous(memory_format=torch.channels_last)
    return y, *_ops.bn_stats.default(y)


def dgrad(grad: Tensor, weight: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of a convolution's input, which is of the shape of ``like``: torch's."""
    return _backward(grad, like, weight, geometry, [True, False, False])[0]


def wgrad(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of a convolution's weight: torch's."""
    return _backward(grad, x, weight, geometry, [False, True, False])[1]


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, groups = geometry
    sides = ([stride] * 2, [padding] * 2, [dilation] * 2)
    dx, dweight, dbias = _aten.convolution_backward.default(
        grad, x, weight, None, *sides, False, [0, 0], groups, wanted
    )
    return None if dx is None else dx.contiguous(memory_format=torch.channels_last), dweight, dbias


def dgrad_add(grad: Tensor, weight: Tensor, addend: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of a convolution's input, plus ``addend``, which is of its shape."""
    return choose(
        "dgrad_add",
        _ops.conv_dgrad_add.default,
        _dgrad_add_apart,
        (grad, weight, addend, *geometry),
    )


def _dgrad_add_apart(grad: Tensor, weight: Tensor, addend: Tensor, *geometry: int) -> Tensor:
    return dgrad(grad, weight, addend, Geometry(*geometry)).add_(addend)


def dgrad_bn_relu(grad: Tensor, weight: Tensor, x: Normalized, geometry: Geometry) -> NormGradients:
    """The way back through a convolution of ``relu(bn(x))``, to ``x``.

    Args:
        grad: the gradient of the convolution's output, channels_last.
        weight: as in :func:`conv_stats`.
        x: the batch norm and its input.
    """
    arguments = (grad, weight, *x, *geometry)
    return NormGradients(*choose("dgrad_bn_relu", _bn_relu_fused, _bn_relu_apart, arguments))


def _bn_relu_fused(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    eps: float,
    training: bool,
    *geometry: int,
) -> tuple[Tensor, ...]:
    scale = _ops.bn_scale.default(var, bn_weight, eps)
    dz, sums = _ops.bn_relu_conv_dgrad.default(grad, weight, x, mean, scale, bn_bias, *geometry)
    own = (x, mean, var, bn_weight, eps)
    dx, dweight = _ops.bn_backward_of_sums.default(dz, sums, *own, training)
    return dx, dweight, sums[0]


def _bn_relu_apart(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    eps: float,
    training: bool,
    *geometry: int,
) -> tuple[Tensor, ...]:
    dz = dgrad(grad, weight, x, Geometry(*geometry))
    vectors = (mean, var, bn_weight, bn_bias)
    return _ops.bn_relu_backward.default(dz, x, *vectors, eps, training)


def dgrad_join(
    grad: Tensor,
    weight: Tensor,
    addend: Tensor,
    mask: Tensor,
    x: Normalized,
    residual: Normalized | None,
    geometry: Geometry,
) -> JoinGradients:
    """The way back through a convolution of ``relu(bn(x) + shortcut)``, to both branches.

    Args:
        grad: the gradient of the convolution's output, channels_last.
        weight: as in :func:`conv_stats`.
        addend: the gradient of the sum's other use, like ``x``.
        mask: uint8 [N, H, W, C / 8], the ReLU's, as ``bn_add_relu`` keeps it.
        x: a batch norm and its input.
        residual: the shortcut's, or None where it has none.
    """
    own = (x.x, x.mean, x.var, x.weight, x.eps, x.training)
    if residual is None:
        name, other = "dgrad_join", (None, None, None, None, 0.0)
    else:
        name, other = "dgrad_join_of_two", (*residual[:4], residual.eps)
    arguments = (grad, weight, addend, mask, *own, *other, *geometry)
    return JoinGradients(*choose(name, _join_fused, _join_apart, arguments))


def _join_fused(
    grad: Tensor,
    weight: Tensor,
    addend: Tensor,
    mask: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor,
    eps: float,
    training: bool,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_eps: float,
    *geometry: int,
) -> tuple[Tensor | None, ...]:
    dz, sums = _ops.bn_add_relu_conv_dgrad.default(
        grad, weight, addend, mask, x, mean, residual, residual_mean, *geometry
    )
    own = (x, mean, var, bn_weight)
    if residual is None:
        dx, dweight = _ops.bn_backward_of_sums.default(dz, sums, *own, eps, training)
        return dx, dweight, sums[0], dz, None
    other = (residual, residual_mean, residual_var, residual_weight)
    dx, dweight, dresidual, dresidual_weight = _ops.bn_add_bn_backward_of_sums.default(
        dz, sums, *own, *other, eps, residual_eps, training
    )
    return dx, dweight, sums[0], dresidual, dresidual_weight


def _join_apart(
    grad: Tensor,
    weight: Tensor,
    addend: Tensor,
    mask: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor,
    eps: float,
    training: bool,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_eps: float,
    *geometry: int,
) -> tuple[Tensor | None, ...]:
    dx = dgrad(grad, weight, x, Geometry(*geometry))
    own = (x, mean, var, bn_weight)
    if residual is None:
        return *_ops.bn_add_relu_fork_backward.default(dx, addend, mask, *own, eps, training), None
    other = (residual, residual_mean, residual_var, residual_weight)
    return _ops.bn_add_bn_relu_fork_backward.default(
        dx, addend, mask, *own, *other, eps, residual_eps, training
    )


if _extension.has_schemas:

    @torch.library.register_fake("fastresnet::conv_sums")
    def _(x, weight, stride, padding, dilation, groups):
        sides = [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
        ]
        y = x.new_empty((x.shape[0], weight.shape[0], *sides))
        sums = x.new_empty((2, weight.shape[0]), dtype=torch.float32)
        return y.contiguous(memory_format=torch.channels_last), sums

    @torch.library.register_fake("fastresnet::bn_stats_of_sums")
    def _(x, sums):
        return torch.empty_like(sums[0]), torch.empty_like(sums[0])

    @torch.library.register_fake("fastresnet::bn_scale")
    def _(var, weight, eps):
        return torch.empty_like(var)

    @torch.library.register_fake("fastresnet::conv_dgrad_add")
    def _(grad, weight, addend, stride, padding, dilation, groups):
        return torch.empty_like(addend, memory_format=torch.channels_last)

    @torch.library.register_fake("fastresnet::bn_relu_conv_dgrad")
    def _(grad, weight, x, mean, scale, bias, stride, padding, dilation, groups):
        dz = torch.empty_like(x, memory_format=torch.channels_last)
        return dz, x.new_empty((2, x.shape[1]), dtype=torch.float32)

    @torch.library.register_fake("fastresnet::bn_add_relu_conv_dgrad")
    def _(grad, weight, addend, mask, x, mean, residual, residual_mean, *geometry):
        dz = torch.empty_like(x, memory_format=torch.channels_last)
        sums = x.new_empty((2 if residual is None else 3, x.shape[1]), dtype=torch.float32)
        return dz, sums

    @torch.library.register_fake("fastresnet::bn_backward_of_sums")
    def _(dz, sums, x, mean, var, weight, eps, training):
        return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight)

    @torch.library.register_fake("fastresnet::bn_add_bn_backward_of_sums")
    def _(dz, sums, x, mean, var, weight, residual, rm, rv, residual_weight, *rest):
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        return dx, torch.empty_like(weight), torch.empty_like(dx), torch.empty_like(residual_weight)

    for _twin in (
        reference.conv_sums,
        reference.bn_stats_of_sums,
        reference.bn_scale,
        reference.conv_dgrad_add,
        reference.bn_relu_conv_dgrad,
        reference.bn_add_relu_conv_dgrad,
        reference.bn_backward_of_sums,
        reference.bn_add_bn_backward_of_sums,
    ):
        torch.library.impl(f"fastresnet::{_twin.__name__}", "CPU")(_twin)
