# SPDX-License-Identifier: Apache-2.0
"""The operators in plain torch: specification, fallback and baseline in one.

Every function here has the signature of its twin in :mod:`fastresnet.ops` and takes any dtype,
layout and device that torch takes. Autograd differentiates them; with ``training=True`` the
statistics are recomputed from ``x``, so that their gradient is torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input


class Normalized(NamedTuple):
    """A tensor and the batch norm to be applied to it.

    ``training`` says that ``mean`` and ``var`` (biased) are the statistics of ``x`` itself.
    """

    x: Tensor  # [N, C, H, W], channels_last
    mean: Tensor  # [C]
    var: Tensor  # [C]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float
    training: bool


class Fork(NamedTuple):
    """One tensor handed out twice, so that the gradients of both uses come back apart."""

    x: Tensor  # [N, C, H, W]
    shortcut: Tensor  # the same values


class ConvGradients(NamedTuple):
    """The gradients of a convolution and the batch norm behind it."""

    x: Tensor | None  # like the convolution's input; None where not wanted
    weight: Tensor  # like the weight
    bn_weight: Tensor  # [out_channels]
    bn_bias: Tensor  # [out_channels]
    sums: Tensor | None  # float64 [2, C], for the batch norm in front; None without one


class ConvStep(NamedTuple):
    """The arguments of a :func:`fastresnet.ops.conv_relu`.

    What it reads is counted: 0 is the sequence's input, i the output of its ith step.
    """

    weight: Any  # a Tensor; where our own kernels run, a PackedWeight
    bias: Tensor | None
    source: int
    residual: int | None
    relu: bool
    stride: int
    padding: int
    dilation: int
    groups: int

    @property
    def geometry(self) -> dict[str, int]:
        """The arguments by name, in the order in which the operators take them."""
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``x`` [N, C, H, W], in at least float32."""
    values = x.detach().to(_statistics_dtype(x))
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    return mean, var


def bn(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    training: bool,
) -> Tensor:
    """Batch norm of ``x`` by the given statistics, or by its own where ``training``."""
    # ATen's batch norm takes the parameters in x's dtype or, for 16-bit x, in float32.
    dtype = _statistics_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    if training:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    return F.batch_norm(x, mean.to(dtype), var.to(dtype), weight, bias, training=False, eps=eps)


def bn_relu(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    training: bool,
) -> Tensor:
    """``relu(bn(x))``."""
    return F.relu(bn(x, mean, var, weight, bias, eps=eps, training=training))


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
    """``max_pool2d(relu(bn(x)))``, with square windows."""
    out = bn_relu(x, mean, var, weight, bias, eps=eps, training=training)
    return F.max_pool2d(out, kernel_size, stride, padding)


def global_avg_pool(x: Tensor) -> Tensor:
    """``adaptive_avg_pool2d(x, 1)``."""
    return F.adaptive_avg_pool2d(x, 1)


def bn_add_relu(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    *,
    eps: float = 1e-5,
    training: bool,
) -> Tensor:
    """``relu(bn(x) + residual)``."""
    return F.relu(bn(x, mean, var, weight, bias, eps=eps, training=training) + residual)


def bn_add_bn_relu(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual_eps: float = 1e-5,
    training: bool,
) -> Tensor:
    """``relu(bn(x) + bn(residual))``, each with its own statistics and parameters."""
    identity = bn(
        residual,
        residual_mean,
        residual_var,
        residual_weight,
        residual_bias,
        eps=residual_eps,
        training=training,
    )
    return bn_add_relu(x, mean, var, weight, bias, identity, eps=eps, training=training)


def bn_add_relu_fork(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    *,
    eps: float = 1e-5,
    training: bool,
) -> Fork:
    """``relu(bn(x) + residual)``, twice."""
    out = bn_add_relu(x, mean, var, weight, bias, residual, eps=eps, training=training)
    return Fork(out, out)


def bn_add_bn_relu_fork(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual_eps: float = 1e-5,
    training: bool,
) -> Fork:
    """``relu(bn(x) + bn(residual))``, twice."""
    out = bn_add_bn_relu(
        *(x, mean, var, weight, bias),
        *(residual, residual_mean, residual_var, residual_weight, residual_bias),
        eps=eps,
        residual_eps=residual_eps,
        training=training,
    )
    return Fork(out, out)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def conv_stats(
    x: Tensor | Normalized,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of ``x``, or of ``relu(bn(x))``, and the statistics of its output."""
    value = _affine(x).relu() if isinstance(x, Normalized) else x
    y = F.conv2d(value, weight.to(value.dtype), None, stride, padding, dilation, groups)
    return y, *bn_stats(y)


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)``, or that without the ReLU."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def conv_relu_sequence(x: Tensor, steps: Sequence[ConvStep]) -> Tensor:
    """:func:`conv_relu` step by step; returns the last one's output."""
    outputs = [x]
    for step in steps:
        residual = None if step.residual is None else outputs[step.residual]
        operands = outputs[step.source], step.weight, step.bias, residual
        outputs.append(conv_relu(*operands, relu=step.relu, **step.geometry))
    return outputs[-1]


def bn_sums(
    grad: Tensor,
    mask: Tensor | None,
    x: Tensor,
    mean: Tensor,
    residual: Tensor | None = None,
    residual_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums of ``g`` and ``g * (x - mean)`` over all but the channels, float64 [2, C]."""
    g = _masked(grad, mask).double()

    def sums(x: Tensor, mean: Tensor) -> Tensor:
        centred = x.double() - _per_channel(mean)
        return torch.stack([g.sum((0, 2, 3)), (g * centred).sum((0, 2, 3))])

    return sums(x, mean), None if residual is None else sums(residual, residual_mean)


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
    """Backward of a convolution and the batch norm behind it, from the sums of that."""
    inverse_std = (y.var.double() + y.eps).rsqrt()
    g = _masked(grad, mask).double()
    if y.training:
        count = grad.numel() // grad.shape[1]
        slope = inverse_std.square() * sums[1] / count
        centred = y.x.double() - _per_channel(y.mean)
        g = g - _per_channel(sums[0] / count) - _per_channel(slope) * centred
    dy = (g * _per_channel(y.weight * inverse_std)).to(y.x.dtype)

    with torch.enable_grad():
        z = (_affine(x) if isinstance(x, Normalized) else x).detach().requires_grad_()
        value = z.relu() if isinstance(x, Normalized) else z
        kernel = weight.detach().to(value.dtype).requires_grad_()
        out = F.conv2d(value, kernel, None, stride, padding, dilation, groups)
    dx, dweight = torch.autograd.grad(out, (z, kernel), dy)
    if addend is not None:
        dx = dx + _masked(addend, addend_mask)
    gradients = ConvGradients(
        dx if wants_dx else None,
        dweight.to(weight.dtype),
        (sums[1] * inverse_std).to(y.mean.dtype),
        sums[0].to(y.mean.dtype),
        None,
    )
    if isinstance(x, Normalized) and wants_dx:
        gradients = gradients._replace(sums=bn_sums(dx, None, x.x, x.mean)[0])
    return gradients


def conv_sums(
    x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Convolution of ``x`` and the sums of its output and of that's squares, float32 [2, C]."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    y = y.contiguous(memory_format=torch.channels_last)
    values = y.float()
    return y, torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])


def bn_stats_of_sums(x: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``x``, whose sums are those of
    :func:`conv_sums`. Its kernel looks at ``x`` only where they say too little."""
    return bn_stats(x)


def bn_scale(var: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight / sqrt(var + eps)``."""
    return weight * (var + eps).rsqrt()


def conv_dgrad_add(
    grad: Tensor,
    weight: Tensor,
    addend: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> Tensor:
    """The gradient of a convolution's input, which has the shape of ``addend``, plus ``addend``,
    rounded once."""
    geometry = (stride, padding, dilation, groups)
    dx = _dgrad(grad, weight, addend, *geometry) + addend.float()
    return dx.to(addend.dtype).contiguous(memory_format=torch.channels_last)


def bn_relu_conv_dgrad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """The way back through a convolution and the ReLU in front of it: ``dz``, the gradient of what
    that ReLU is of, ``(x - mean) * scale + bias``; and the sums of ``dz`` and ``dz * (x - mean)``,
    float32 [2, C]."""
    dz = _dgrad(grad, weight, x, stride, padding, dilation, groups)
    centred = x.float() - _per_channel(mean)
    passes = centred * _per_channel(scale) + _per_channel(bias) > 0
    return _with_sums(dz * passes, centred, dtype=x.dtype)


def bn_add_relu_conv_dgrad(
    grad: Tensor,
    weight: Tensor,
    addend: Tensor,
    mask: Tensor,
    x: Tensor,
    mean: Tensor,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """The way back through a convolution to the sum in front of it, ``relu(bn(x) + residual)``,
    whose other use has the gradient ``addend``: ``dz``, the gradient of that sum, and the sums of
    ``dz``, ``dz * (x - mean)`` and, with a residual that is normalised too,
    ``dz * (residual - residual_mean)``, float32 [2 or 3, C]."""
    dz = _dgrad(grad, weight, x, stride, padding, dilation, groups) + addend.float()
    centred = [x.float() - _per_channel(mean)]
    if residual is not None:
        centred.append(residual.float() - _per_channel(residual_mean))
    return _with_sums(_masked(dz, mask), *centred, dtype=x.dtype)


def bn_backward_of_sums(
    dz: Tensor,
    sums: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and ``weight`` of a batch norm, from ``dz``, the gradient behind it,
    and its sums as in :func:`bn_relu_conv_dgrad`."""
    sum_dz, dot = sums.double()
    inverse_std = (var.double() + eps).rsqrt()
    g = dz.double()
    if training:
        count = dz.numel() // dz.shape[1]
        slope = inverse_std.square() * dot / count
        g = g - _per_channel(sum_dz / count)
        g = g - _per_channel(slope) * (x.double() - _per_channel(mean))
    dx = (g * _per_channel(weight * inverse_std)).to(x.dtype)
    return dx, (dot * inverse_std).to(weight.dtype)


def bn_add_bn_backward_of_sums(
    dz: Tensor,
    sums: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor,
    eps: float,
    residual_eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`bn_backward_of_sums` of both branches of ``bn(x) + bn(residual)``."""
    own = bn_backward_of_sums(dz, sums[:2], x, mean, var, weight, eps, training)
    vectors = (residual_mean, residual_var, residual_weight)
    other = bn_backward_of_sums(dz, sums[::2], residual, *vectors, residual_eps, training)
    return *own, *other


def _dgrad(grad: Tensor, weight: Tensor, like: Tensor, *geometry: int) -> Tensor:
    """The gradient of a convolution's input of the shape of ``like``, float32."""
    return conv2d_input(like.shape, weight.float(), grad.float(), *geometry)


def _with_sums(dz: Tensor, *centred: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``dz`` in ``dtype``, channels_last, and its sum and those of its products."""
    products = [dz, *(dz * values for values in centred)]
    sums = torch.stack([product.sum((0, 2, 3)) for product in products])
    return dz.to(dtype).contiguous(memory_format=torch.channels_last), sums


def _affine(x: Normalized) -> Tensor:
    return bn(x.x, x.mean, x.var, x.weight, x.bias, eps=x.eps, training=False)


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _masked(grad: Tensor, mask: Tensor | None) -> Tensor:
    """``grad`` [N, C, H, W] where its bit in ``mask`` (uint8 [N, H, W, C / 8]) is set, else 0."""
    if mask is None:
        return grad
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return grad * bits.flatten(3)[..., : grad.shape[1]].permute(0, 3, 1, 2)
