# SPDX-License-Identifier: Apache-2.0
"""The operators in plain torch: specification, fallback and baseline in one.

Every function here has the signature of its twin in :mod:`fastresnet.ops` and takes any dtype,
layout and device that torch takes. Autograd differentiates them; with ``training=True`` the
statistics are recomputed from ``x``, so that their gradient is torch's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)``."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return F.relu(y if residual is None else y + residual)


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


def _affine(x: Normalized) -> Tensor:
    return bn(x.x, x.mean, x.var, x.weight, x.bias, eps=x.eps, training=False)


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _masked(grad: Tensor, mask: Tensor | None) -> Tensor:
    """``grad`` [N, C, H, W] where its bit in ``mask`` (uint8 [N, H, W, C / 8]) is set, else 0."""
    if mask is None:
        return grad
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return grad * bits.flatten(3)[..., : grad.shape[1]].permute(0, 3, 1, 2)
