# SPDX-License-Identifier: Apache-2.0
"""The stem of a network behind its convolution: batch norm, ReLU and max-pool in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from ..ops import Normalized
from .batch_norm import PendingBatchNorm, fused_call, has_hooks, is_relu
from .join import Join
from .links import runs_as_node


def pooled_stem(
    bn: nn.Module, relu: nn.Module, pool: nn.Module, x: Tensor
) -> tuple[Tensor, Join | None]:
    """``pool(relu(bn(x)))``, with what lies between neither computed twice nor stored.

    Modules of other classes or with hooks, and windows that the kernel does not take, run as they
    would by themselves.

    Args:
        bn, relu, pool: any modules; fused are ``nn.BatchNorm2d``, ``nn.ReLU`` and
            ``nn.MaxPool2d``.
        x: [N, C, H, W].

    Returns:
        The output and, where ``pool`` is an ``nn.Identity``, as in networks for small images, what
        it is made of.
    """
    x = fused_call(bn, x)
    if isinstance(x, PendingBatchNorm) and is_relu(relu):
        windows = square_windows(pool)
        if windows is not None and ops.has_max_pool_kernel(x.x, **windows):
            return ops.bn_relu_max_pool(*x[:5], **windows, eps=x.eps, training=x.training), None
        if type(pool) is nn.Identity and not has_hooks(pool):
            out = x.relu()
            return out, _made_of(x) if out.requires_grad else None
    x = fused_call(relu, x)
    return pool(x), None


def _made_of(bn: PendingBatchNorm) -> Join | None:
    if not runs_as_node(bn.x) or bn.weight is None:
        return None
    vectors = (vector.detach().float() for vector in bn[1:5])
    return Join(Normalized(bn.x.detach(), *vectors, bn.eps, bn.training), None)


def square_windows(pool: nn.Module) -> dict[str, int] | None:
    """The windows of ``pool`` as the operator's arguments, or None where they are not those of a
    plain pooling in both dimensions alike."""
    if (
        type(pool) is not nn.MaxPool2d
        or has_hooks(pool)
        or pool.return_indices
        or pool.ceil_mode
        or _same_both_ways(pool.dilation) != 1
    ):
        return None
    names = ("kernel_size", "stride", "padding")
    windows = {name: _same_both_ways(getattr(pool, name)) for name in names}
    return None if None in windows.values() else windows


def _same_both_ways(size: Any) -> int | None:
    if isinstance(size, (tuple, list)):
        return size[0] if len(size) == 2 and size[0] == size[1] else None
    return size
