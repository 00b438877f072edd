# SPDX-License-Identifier: Apache-2.0
"""Runs torch's own batch-norm modules through the fused operators.

A batch norm is taken in two steps: :func:`fused_call` on an ``nn.BatchNorm2d`` measures (or looks
up) the statistics and returns a :class:`PendingBatchNorm`; the ReLU, or the add and ReLU, that
comes next does all of it in one pass. So a forward reads as it always did, a call a line. Wherever
the kernels do not apply, or somebody would notice that a module was not called (a hook, a tracer),
the module itself is called instead, and everything is as in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from .. import _extension, ops
from ..ops import Fork
from .running_stats import Seen, update_running_stats
from .sync import SyncBatchNorm

_BATCH_NORMS = (nn.BatchNorm2d, SyncBatchNorm)
_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)


class PendingBatchNorm(NamedTuple):
    """A batch norm whose statistics are known and which is still to be applied to ``x``.

    ``training`` says that ``mean`` and ``var`` (biased) are the statistics of ``x`` itself.
    """

    x: Tensor  # [N, C, H, W], channels_last
    mean: Tensor  # [C]
    var: Tensor  # [C]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float
    training: bool

    def apply(self) -> Tensor:
        x, mean, var, weight, bias, eps, training = self
        return ops.bn(x, mean, var, weight, bias, eps=eps, training=training)

    def relu(self) -> Tensor:
        x, mean, var, weight, bias, eps, training = self
        return ops.bn_relu(x, mean, var, weight, bias, eps=eps, training=training)


def fused_call(function: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """``function(x, ...)``, with batch norm put off and joined to a ReLU where it can be.

    Args:
        function: a module or function; any.
        x: what to call it with, or what an earlier :func:`fused_call` returned.
        args, kwargs: passed on; a fused ReLU leaves out its ``inplace``.

    Returns:
        What ``function`` returns, or, for a batch norm that can be fused, a
        :class:`PendingBatchNorm`: hand it to the next :func:`fused_call`, to :func:`add_relu` or
        to :func:`materialize`.
    """
    if isinstance(x, PendingBatchNorm):
        if is_relu(function):
            return x.relu()
        x = x.apply()
    elif type(function) in _BATCH_NORMS and not args and not kwargs and not has_hooks(function):
        pending = begin_batch_norm(function, x)
        if pending is not None:
            return pending
    return function(x, *args, **kwargs)


def add_relu(
    relu: Callable[..., Any],
    x: PendingBatchNorm | Tensor,
    residual: PendingBatchNorm | Tensor,
    *,
    overwrite: bool = False,
    **kwargs: Any,
) -> Tensor:
    """``relu(x + residual)`` in one pass where ``x`` (and perhaps ``residual``) is pending.

    Args:
        relu: a module or function; any.
        x, residual: what to add, or what :func:`fused_call` returned.
        overwrite: add by ``x += residual``, as torchvision's blocks do, where it is not fused.
        kwargs: passed on to ``relu``; a fused one leaves out its ``inplace``.
    """
    out = _fused_join(ops.bn_add_relu, ops.bn_add_bn_relu, relu, x, residual)
    if out is not None:
        return out
    x, residual = materialize(x), materialize(residual)
    if overwrite:
        x += residual
    else:
        x = x + residual
    return relu(x, **kwargs)


def add_relu_fork(
    relu: Callable[..., Any],
    x: PendingBatchNorm | Tensor,
    residual: PendingBatchNorm | Tensor,
) -> Fork:
    """:func:`add_relu` for an output that is used twice."""
    fork = _fused_join(ops.bn_add_relu_fork, ops.bn_add_bn_relu_fork, relu, x, residual)
    if fork is not None:
        return fork
    out = add_relu(relu, x, residual, overwrite=True)
    return Fork(out, out)


def _fused_join(
    single: Callable[..., Any],
    dual: Callable[..., Any],
    relu: Callable[..., Any],
    x: PendingBatchNorm | Tensor,
    residual: PendingBatchNorm | Tensor,
) -> Any:
    """What ``dual`` returns where both branches are pending, ``single`` where only ``x`` is; None
    where neither applies."""
    if not isinstance(x, PendingBatchNorm) or not is_relu(relu):
        return None
    if isinstance(residual, PendingBatchNorm):
        if residual.training == x.training and _can_join(x.x, residual.x):
            return dual(
                *x[:5],
                *residual[:5],
                eps=x.eps,
                residual_eps=residual.eps,
                training=x.training,
            )
        residual = residual.apply()
    if not _can_join(x.x, residual):
        return None
    residual = residual.contiguous(memory_format=torch.channels_last)
    return single(*x[:5], residual, eps=x.eps, training=x.training)


def materialize(x: Any) -> Any:
    """The batch norm applied, if ``x`` is pending; otherwise ``x``."""
    return x.apply() if isinstance(x, PendingBatchNorm) else x


def begin_batch_norm(bn: nn.BatchNorm2d | SyncBatchNorm, x: Any) -> PendingBatchNorm | None:
    """The first half of ``bn(x)``, or None (and nothing done) where the kernels cannot take over.

    Chooses the statistics and updates the running ones exactly as ``nn.BatchNorm2d.forward``.
    Hooks on ``bn`` are the caller's concern.
    """
    if is_transformed(x) or (bn.running_mean is None) != (bn.running_var is None):
        return None
    x = to_kernel_layout(x)
    if not ops.has_kernel(x) or x.shape[1] != bn.num_features:
        return None
    if isinstance(bn, SyncBatchNorm) and bn.is_shared():
        mean, var, weight, bias, count = bn.share(x)
        bn.remember(mean, var, count)
        return PendingBatchNorm(x, mean, var, weight, bias, bn.eps, training=False)
    if not bn.training and bn.running_mean is not None:
        mean, var, training = bn.running_mean, bn.running_var, False
    else:
        mean, var = ops.bn_stats(x)
        training = True
        if bn.training and bn.track_running_stats:
            update_running_stats([Seen(bn, mean, var, x.numel() // x.shape[1])])
    return PendingBatchNorm(x, mean, var, bn.weight, bn.bias, bn.eps, training)


def to_kernel_layout(x: Any) -> Any:
    """``x`` in channels_last if the kernels take it there; ``x`` itself if not.

    An NCHW tensor costs one copy, at the entry of a network: convolutions keep the layout.
    """
    if (
        not is_transformed(x)
        and x.dim() == 4
        and _extension.takes(x.device)
        and x.dtype in ops.KERNEL_DTYPES
        and x.numel() > x.shape[1]
    ):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def is_relu(function: Callable[..., Any]) -> bool:
    if isinstance(function, nn.Module):
        return type(function) is nn.ReLU and not has_hooks(function)
    return function in _RELU_FUNCTIONS


def _can_join(x: Tensor, residual: Any) -> bool:
    # A residual that broadcasts or has another dtype (a float32 input under autocast) is torch's.
    return (
        not is_transformed(residual)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def is_transformed(x: Any) -> bool:
    """Whether ``x`` is not a plain tensor in a plain run: torch.fx's proxy, or tracing, ONNX
    export, forward-mode AD, vmap and torch.func, for which the operators have no rule."""
    if not isinstance(x, Tensor) or torch.onnx.is_in_onnx_export():
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
    )


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm and ReLU as one module, for networks of your own.

    Parameters, buffers and arguments are those of :class:`torch.nn.BatchNorm2d`.
    Synchronised training, torch's or :func:`fastresnet.nn.sync_batch_norm`, would lose the ReLU:
    for that use ``nn.BatchNorm2d`` and ``nn.ReLU``, which :func:`fastresnet.convert` fuses as well.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``relu(bn(input))``, or ``relu(bn(input) + residual)``.

        Args:
            input: [N, C, H, W].
            residual: of ``input``'s shape, or None.

        Returns:
            [N, C, H, W] in ``input``'s dtype.
        """
        x = begin_batch_norm(self, input)
        if x is None:
            x = super().forward(input)
        return fused_call(F.relu, x) if residual is None else add_relu(F.relu, x, residual)
