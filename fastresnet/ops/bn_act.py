# SPDX-License-Identifier: Apache-2.0
"""Batch norm with what follows it (nothing, ReLU, add + ReLU, the other branch's batch norm + add
+ ReLU) as one operator each, forward and backward.

The statistics are arguments: ``bn_stats`` measures them, or the running ones are given.
``training=True`` says that they are the batch's own, so that the gradient of ``x`` carries their
terms (Ioffe & Szegedy, 2015). That leaves room between the two for a synchronised batch norm.

Where :func:`has_kernel` is false the twins in :mod:`fastresnet.ops.reference` run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _extension
from . import reference
from .reference import Fork

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernel(x: Tensor) -> bool:
    """Whether the compiled operators take ``x``: float32, bfloat16 or float16 of [N, C, H, W],
    dense in channels_last, more than one value a channel, on a device whose library is loaded."""
    return is_kernel_input(x) and x.numel() > x.shape[1]


def is_kernel_input(x: Tensor) -> bool:
    """:func:`has_kernel` for operators that take one value a channel too."""
    return (
        _extension.takes(x.device)
        and x.dtype in KERNEL_DTYPES
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
    )


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel.

    Args:
        x: [N, C, H, W].

    Returns:
        mean, var: float32 [C] (float64 for float64 ``x``). No gradient flows through them.
    """
    if not has_kernel(x):
        return reference.bn_stats(x)
    return torch.ops.fastresnet.bn_stats.default(x.detach())


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
    """Batch norm: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        x: [N, C, H, W].
        mean, var: [C], the statistics to normalise by; ``var`` is the biased variance.
        weight, bias: [C], or None for ones and zeros.
        eps: added to the variance.
        training: whether ``mean`` and ``var`` are the statistics of ``x`` itself.

    Returns:
        [N, C, H, W] in ``x``'s dtype and layout, computed in float32 and rounded once.

    Raises:
        ValueError: a vector has not one value a channel.
    """
    if not has_kernel(x):
        return reference.bn(x, mean, var, weight, bias, eps=eps, training=training)
    vectors = _vectors(x, mean, var, weight, bias)
    return torch.ops.fastresnet.bn.default(x, *vectors, eps, training)


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
    """``relu(bn(x))``; arguments as :func:`bn`. Saves only ``x`` for backward."""
    if not has_kernel(x):
        return reference.bn_relu(x, mean, var, weight, bias, eps=eps, training=training)
    vectors = _vectors(x, mean, var, weight, bias)
    return torch.ops.fastresnet.bn_relu.default(x, *vectors, eps, training)


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
    """``relu(bn(x) + residual)``; arguments as :func:`bn`, ``residual`` like ``x``.

    Saves ``x`` and one bit an element for backward.
    """
    if not _has_join_kernel(x, residual):
        return reference.bn_add_relu(
            x, mean, var, weight, bias, residual, eps=eps, training=training
        )
    vectors = _vectors(x, mean, var, weight, bias)
    out, _mask = torch.ops.fastresnet.bn_add_relu.default(x, *vectors, residual, eps, training)
    return out


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
    """``relu(bn(x) + bn(residual))``, the end of a block whose shortcut is a projection.

    Arguments as :func:`bn`, once for each branch. Saves ``x``, ``residual`` and one bit an element
    for backward.
    """
    if not _has_join_kernel(x, residual):
        return reference.bn_add_bn_relu(
            x,
            mean,
            var,
            weight,
            bias,
            residual,
            residual_mean,
            residual_var,
            residual_weight,
            residual_bias,
            eps=eps,
            residual_eps=residual_eps,
            training=training,
        )
    vectors = _vectors(x, mean, var, weight, bias)
    residual_vectors = _vectors(
        residual, residual_mean, residual_var, residual_weight, residual_bias
    )
    out, _mask = torch.ops.fastresnet.bn_add_bn_relu.default(
        x, *vectors, residual, *residual_vectors, eps, residual_eps, training
    )
    return out


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
    """:func:`bn_add_relu`, its output handed out twice.

    The gradients of both come back apart and are added as the backward reads them: a pass over
    memory less than autograd's own sum, which rounds alike. Neither may be changed in place.
    """
    if not _has_join_kernel(x, residual):
        return reference.bn_add_relu_fork(
            x, mean, var, weight, bias, residual, eps=eps, training=training
        )
    vectors = _vectors(x, mean, var, weight, bias)
    return Fork(*_BnAddReluFork.apply(x, *vectors, residual, eps, training))


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
    """:func:`bn_add_bn_relu`, its output handed out twice, as in :func:`bn_add_relu_fork`."""
    residual_vectors = (residual_mean, residual_var, residual_weight, residual_bias)
    if not _has_join_kernel(x, residual):
        return reference.bn_add_bn_relu_fork(
            *(x, mean, var, weight, bias, residual, *residual_vectors),
            eps=eps,
            residual_eps=residual_eps,
            training=training,
        )
    vectors = _vectors(x, mean, var, weight, bias)
    residual_vectors = _vectors(residual, *residual_vectors)
    return Fork(
        *_BnAddBnReluFork.apply(
            x, *vectors, residual, *residual_vectors, eps, residual_eps, training
        )
    )


def _has_join_kernel(x: Tensor, residual: Tensor) -> bool:
    # A residual that only broadcasts, or of another dtype, is torch's to add.
    return (
        has_kernel(x)
        and residual.dtype == x.dtype
        and residual.shape == x.shape
        and residual.device == x.device
        and residual.is_contiguous(memory_format=torch.channels_last)
    )


def _vectors(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four vectors as the kernels take them: float32, never None, the gradient kept."""
    if weight is None:
        weight = torch.ones_like(mean)
    if bias is None:
        bias = torch.zeros_like(mean)
    return mean.float(), var.float(), weight.float(), bias.float()


# Fakes: shapes, dtypes and strides for torch.compile, torch.export and meta tensors.


def _fake_gradients(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dweight = x.new_empty(x.shape[1], dtype=torch.float32)
    return dx, dweight, torch.empty_like(dweight)


def _fake_join(x: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, x.new_empty((n, h, w, (c + 7) // 8), dtype=torch.uint8)


if _extension.has_schemas:

    @torch.library.register_fake("fastresnet::bn_stats")
    def _(x):
        mean = x.new_empty(x.shape[1], dtype=torch.float32)
        return mean, torch.empty_like(mean)

    @torch.library.register_fake("fastresnet::bn")
    def _(x, mean, var, weight, bias, eps, training):
        return torch.empty_like(x, memory_format=torch.channels_last)

    @torch.library.register_fake("fastresnet::bn_relu")
    def _(x, mean, var, weight, bias, eps, training):
        return torch.empty_like(x, memory_format=torch.channels_last)

    @torch.library.register_fake("fastresnet::bn_add_relu")
    def _(x, mean, var, weight, bias, residual, eps, training):
        return _fake_join(x)

    @torch.library.register_fake("fastresnet::bn_add_bn_relu")
    def _(x, mean, var, weight, bias, residual, rm, rv, rw, rb, eps, residual_eps, training):
        return _fake_join(x)

    @torch.library.register_fake("fastresnet::bn_backward")
    def _(grad, x, mean, var, weight, eps, training):
        return _fake_gradients(x)

    @torch.library.register_fake("fastresnet::bn_relu_backward")
    def _(grad, x, mean, var, weight, bias, eps, training):
        return _fake_gradients(x)

    @torch.library.register_fake("fastresnet::bn_add_relu_backward")
    def _(grad, mask, x, mean, var, weight, eps, training):
        return *_fake_gradients(x), torch.empty_like(x, memory_format=torch.channels_last)

    @torch.library.register_fake("fastresnet::bn_add_relu_fork_backward")
    def _(grad, shortcut_grad, mask, x, mean, var, weight, eps, training):
        return *_fake_gradients(x), torch.empty_like(x, memory_format=torch.channels_last)

    @torch.library.register_fake("fastresnet::bn_add_bn_relu_fork_backward")
    def _(grad, shortcut_grad, mask, x, mean, var, weight, residual, *rest):
        dx, dweight, dbias = _fake_gradients(x)
        return dx, dweight, dbias, torch.empty_like(dx), torch.empty_like(dweight)

    # On the CPU a block is one node (fastresnet.nn.residual), so nothing is gained there.
    @torch.library.impl("fastresnet::bn_add_relu_fork_backward", "CPU")
    def _(grad, shortcut_grad, *rest):
        return torch.ops.fastresnet.bn_add_relu_backward.default(grad + shortcut_grad, *rest)

    @torch.library.impl("fastresnet::bn_add_bn_relu_fork_backward", "CPU")
    def _(grad, shortcut_grad, *rest):
        return torch.ops.fastresnet.bn_add_bn_relu_backward.default(grad + shortcut_grad, *rest)

    @torch.library.register_fake("fastresnet::bn_add_bn_relu_backward")
    def _(grad, mask, x, mean, var, weight, residual, rm, rv, rw, eps, residual_eps, training):
        dx, dweight, dbias = _fake_gradients(x)
        return dx, dweight, dbias, torch.empty_like(dx), torch.empty_like(dweight)


# Autograd. A gradient arrives in any layout (a mean or a flatten hands over an expanded one).


def _channels_last(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last)


def as_kernels_take(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Saved tensors, those of [N, C, H, W] in channels_last: hooks that keep them elsewhere until
    the backward, such as :class:`torch.autograd.graph.save_on_cpu`, may lose their layout.

    Bits of masks, uint8 [N, H, W, C / 8], stay as they are.
    """
    return [
        tensor.contiguous(memory_format=torch.channels_last)
        if tensor is not None and tensor.dim() == 4 and tensor.is_floating_point()
        else tensor
        for tensor in tensors
    ]


def _bn_setup_context(ctx, inputs, output):
    x, mean, var, weight, _bias, ctx.eps, ctx.training = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, weight)


def _bn_backward(ctx, grad):
    if grad is None:
        return (None,) * 7
    dx, dweight, dbias = torch.ops.fastresnet.bn_backward.default(
        _channels_last(grad), *as_kernels_take(ctx.saved_tensors), ctx.eps, ctx.training
    )
    return dx, None, None, dweight, dbias, None, None


def _bn_relu_setup_context(ctx, inputs, output):
    x, mean, var, weight, bias, ctx.eps, ctx.training = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, weight, bias)


def _bn_relu_backward(ctx, grad):
    if grad is None:
        return (None,) * 7
    dx, dweight, dbias = torch.ops.fastresnet.bn_relu_backward.default(
        _channels_last(grad), *as_kernels_take(ctx.saved_tensors), ctx.eps, ctx.training
    )
    return dx, None, None, dweight, dbias, None, None


def _bn_add_relu_setup_context(ctx, inputs, output):
    x, mean, var, weight, _bias, _residual, ctx.eps, ctx.training = inputs
    _out, mask = output
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, x, mean, var, weight)


def _bn_add_relu_backward(ctx, grad, _grad_mask):
    if grad is None:
        return (None,) * 8
    dx, dweight, dbias, dresidual = torch.ops.fastresnet.bn_add_relu_backward.default(
        _channels_last(grad), *as_kernels_take(ctx.saved_tensors), ctx.eps, ctx.training
    )
    return dx, None, None, dweight, dbias, dresidual, None, None


def _bn_add_bn_relu_setup_context(ctx, inputs, output):
    x, mean, var, weight, _bias, residual, rm, rv, rw, _rb = inputs[:10]
    ctx.eps, ctx.residual_eps, ctx.training = inputs[10:]
    _out, mask = output
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, x, mean, var, weight, residual, rm, rv, rw)


def _bn_add_bn_relu_backward(ctx, grad, _grad_mask):
    if grad is None:
        return (None,) * 13
    dx, dweight, dbias, dresidual, dresidual_weight = (
        torch.ops.fastresnet.bn_add_bn_relu_backward.default(
            _channels_last(grad),
            *as_kernels_take(ctx.saved_tensors),
            ctx.eps,
            ctx.residual_eps,
            ctx.training,
        )
    )
    # Both biases shift the same sum, so they have the same gradient; autograd wants two tensors.
    return (
        *(dx, None, None, dweight, dbias),
        *(dresidual, None, None, dresidual_weight, dbias.clone()),
        *(None, None, None),
    )


# An operator may not return one tensor twice, so the forks are nodes of their own.


def _fork_backward(name: str, ctx: Any, grads: tuple[Tensor | None, ...], *rest: Any):
    """The gradients of ``fastresnet::<name>``'s arguments from those of its one or two outputs."""
    grads = [_channels_last(grad) for grad in grads if grad is not None]
    backward = f"{name}_fork_backward" if len(grads) == 2 else f"{name}_backward"
    return getattr(torch.ops.fastresnet, backward).default(
        *grads, *as_kernels_take(ctx.saved_tensors), *rest
    )


class _BnAddReluFork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, mean, var, weight, _bias, _residual, ctx.eps, ctx.training = inputs
        out, mask = torch.ops.fastresnet.bn_add_relu.default(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask, x, mean, var, weight)
        return out, out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        if grads == (None, None):
            return (None,) * 8
        dx, dweight, dbias, dresidual = _fork_backward(
            "bn_add_relu", ctx, grads, ctx.eps, ctx.training
        )
        return dx, None, None, dweight, dbias, dresidual, None, None


class _BnAddBnReluFork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, mean, var, weight, _bias, residual, rm, rv, rw, _rb = inputs[:10]
        ctx.rest = inputs[10:]
        out, mask = torch.ops.fastresnet.bn_add_bn_relu.default(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask, x, mean, var, weight, residual, rm, rv, rw)
        return out, out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        if grads == (None, None):
            return (None,) * 13
        dx, dweight, dbias, dresidual, dresidual_weight = _fork_backward(
            "bn_add_bn_relu", ctx, grads, *ctx.rest
        )
        return (
            *(dx, None, None, dweight, dbias),
            *(dresidual, None, None, dresidual_weight, dbias.clone()),
            *(None, None, None),
        )


def _no_double_backward(ctx, *grads):
    raise RuntimeError("fastresnet: the batch norm operators cannot be differentiated twice")


if _extension.has_schemas:
    for _name, _backward, _setup_context in (
        ("bn", _bn_backward, _bn_setup_context),
        ("bn_relu", _bn_relu_backward, _bn_relu_setup_context),
        ("bn_add_relu", _bn_add_relu_backward, _bn_add_relu_setup_context),
        ("bn_add_bn_relu", _bn_add_bn_relu_backward, _bn_add_bn_relu_setup_context),
    ):
        torch.library.register_autograd(
            f"fastresnet::{_name}", _backward, setup_context=_setup_context
        )
        torch.library.register_autograd(f"fastresnet::{_name}_backward", _no_double_backward)
