# SPDX-License-Identifier: Apache-2.0
"""A residual block in inference: one call of :func:`fastresnet.ops.conv_relu` a convolution."""

from __future__ import annotations

from torch import Tensor, nn

from .batch_norm import is_relu
from .folding import fold, may_fold
from .links import Link
from .residual import as_link


def folded_block(
    links: list[Link], relu: nn.Module, downsample: nn.Module | None, x: Tensor
) -> Tensor | None:
    """A residual block without gradients, a call a convolution, or None (and nothing done) where
    something asks for more than the fused convolutions do.

    Arguments as of :func:`fastresnet.nn.residual.residual_block`.
    """
    if not may_fold(x) or not is_relu(relu):
        return None
    projection = as_link(downsample) if downsample is not None else None
    if downsample is not None and projection is None:
        return None
    folds = fold(links, [] if projection is None else [projection], x)
    if folds is None:
        return None
    residual = x
    for shortcut in folds.shortcut:
        residual = shortcut(x, relu=False)
    *others, last = folds.links
    for link in others:
        x = link(x)
    return last(x, residual)
