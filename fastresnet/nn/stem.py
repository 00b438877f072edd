# SPDX-License-Identifier: Apache-2.0
"""The stem of a network: convolution, batch norm, ReLU and max-pool, joined where it can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Normalized
from .batch_norm import PendingBatchNorm, fused_call, has_hooks, is_relu
from .chain import run_chain
from .fold_store import forget_folds
from .folding import run_folded
from .join import Join
from .links import runs_as_node
from .windows import square_windows


def run_stem(
    conv: nn.Module, bn: nn.Module, relu: nn.Module, pool: nn.Module, x: Tensor
) -> tuple[Tensor, Join | None]:
    """``pool(relu(bn(conv(x))))``, with what lies between computed once, and stored once at most.

    Modules of other classes or with hooks, and windows that the kernel does not take, run as they
    would by themselves.

    Args:
        conv, bn, relu, pool: any modules; fused are ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.ReLU``
            and ``nn.MaxPool2d``.
        x: [N, C, H, W].

    Returns:
        The output and, where ``pool`` is an ``nn.Identity``, as in networks for small images, what
        it is made of.
    """
    modules = [conv, bn, relu, pool]
    if torch.is_grad_enabled():
        for module in modules:
            forget_folds(module)
    out, count, source = run_chain(modules, x)
    if count == 0:
        out, count = run_folded(modules, x)
    if count == 0:
        return pooled_stem(bn, relu, pool, conv(x))
    for module in modules[count:]:
        out = module(out)
    return out, source if _is_identity(pool) else None


def pooled_stem(
    bn: nn.Module, relu: nn.Module, pool: nn.Module, x: Tensor
) -> tuple[Tensor, Join | None]:
    """:func:`run_stem` behind its convolution."""
    x = fused_call(bn, x)
    if isinstance(x, PendingBatchNorm) and is_relu(relu):
        windows = square_windows(pool)
        if windows is not None and ops.has_max_pool_kernel(x.x, **windows):
            return ops.bn_relu_max_pool(*x[:5], **windows, eps=x.eps, training=x.training), None
        if _is_identity(pool):
            out = x.relu()
            return out, _made_of(x) if out.requires_grad else None
    x = fused_call(relu, x)
    return pool(x), None


def _is_identity(pool: nn.Module) -> bool:
    return type(pool) is nn.Identity and not has_hooks(pool)


def _made_of(bn: PendingBatchNorm) -> Join | None:
    if not runs_as_node(bn.x) or bn.weight is None:
        return None
    vectors = (vector.detach().float() for vector in bn[1:5])
    return Join(Normalized(bn.x.detach(), *vectors, bn.eps, bn.training), None)
