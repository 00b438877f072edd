# SPDX-License-Identifier: Apache-2.0
"""A residual block in inference: one call of :func:`fastresnet.ops.conv_relu` a convolution."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .batch_norm import is_relu
from .folding import can_fold, fold, may_fold
from .links import Link, channels_fit, sizes_behind
from .residual import as_link, branches_fit


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
    shortcut = [] if projection is None else [projection]
    if not all(can_fold(link, x) for link in [*links, *shortcut]):
        return None
    if not channels_fit(links, x) or not branches_fit(links[-1], projection, x):
        return None
    if sizes_behind(links, x) != sizes_behind(shortcut, x):
        return None

    # The projection's bias is added with the last convolution's, so that it takes no pass.
    folds = [fold(link, None, x) for link in [*links[:-1], *shortcut]]
    last = fold(links[-1], projection, x)
    if not all(folded.fits for folded in [*folds, last]):
        return None
    residual = x
    if projection is not None:
        weight = folds.pop().weight
        residual = ops.launch_conv_relu(x, weight, None, relu=False, **projection.geometry)
    for link, folded in zip(links[:-1], folds, strict=True):
        x = ops.launch_conv_relu(x, folded.weight, folded.bias, **link.geometry)
    return ops.launch_conv_relu(x, last.weight, last.bias, residual, **links[-1].geometry)
