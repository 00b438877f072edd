# SPDX-License-Identifier: Apache-2.0
"""Residual blocks in training on CUDA, cut where a backward is best cut: between the last
convolution of a block and the join behind it.

A segment is the join of one block and the convolutions of the next, one autograd node. So the
gradient of a join's output, which two uses send back, is computed where both are known: in the
kernel of the first convolution's input gradient, with the ReLU's backward and the sums that the
batch norms of the join need (:mod:`fastresnet.ops.conv_graph`). Between two segments the raw
outputs of the convolutions are handed on, and their gradients back.

Saved for backward are the convolutions' inputs and raw outputs, vectors, and one bit for each value
of a join.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..ops import Geometry, Normalized, conv_graph
from .batch_norm import PendingBatchNorm, add_relu, is_relu
from .blocks import BasicBlock, Bottleneck
from .links import (
    Link,
    channels_fit,
    computed_dtype,
    is_standard,
    remember,
    sizes_behind,
    values_a_channel,
)
from .residual import as_link, branches_fit


class Convolutions(NamedTuple):
    """Those of one block, with their batch norms."""

    links: list[Link]
    projection: Link | None  # of the shortcut
    counts: list[int]  # of the values a channel behind each of `every`

    @property
    def every(self) -> list[Link]:
        return self.links if self.projection is None else [*self.links, self.projection]


class Branches(NamedTuple):
    """What a block adds up: the way through the convolutions and the shortcut."""

    x: PendingBatchNorm
    residual: PendingBatchNorm | Tensor


class Join(NamedTuple):
    """What a segment knows of the batch norms in front of it, beside their tensors."""

    eps: float
    residual_eps: float | None  # None: the shortcut has none

    @property
    def tensors(self) -> int:
        return 6 if self.residual_eps is None else 10


def run_segments(blocks: Sequence[BasicBlock | Bottleneck], x: Tensor) -> Tensor | None:
    """``x`` through ``blocks``, or None (and nothing done) where something asks for more than the
    kernels do.

    Args:
        blocks: one behind another; at least one.
        x: [N, C, H, W].
    """
    if not ops.has_kernel(x):
        return None
    found = []
    like = x
    for block in blocks:
        convolutions = _convolutions(block, like)
        if convolutions is None or not all(_is_plain(link, x) for link in convolutions.every):
            return None
        found.append(convolutions)
        sizes = sizes_behind(convolutions.links, like)
        channels = convolutions.links[-1].conv.out_channels
        like = torch.empty((x.shape[0], channels, *sizes), device="meta")
    branches = None
    for convolutions in found:
        branches = _run_segment(convolutions, x, branches)
    return add_relu(blocks[-1].relu, *branches)


def _convolutions(block: BasicBlock | Bottleneck, x: Tensor) -> Convolutions | None:
    """Those of ``block`` if both its branches take ``x`` and end alike, with more than one value a
    channel, for which torch has words of its own."""
    links = block.links
    projection = None if block.downsample is None else as_link(block.downsample)
    shortcut = [] if projection is None else [projection]
    if (
        (projection is None) != (block.downsample is None)
        or not is_relu(block.relu)
        or not channels_fit(links, x)
        or not branches_fit(links[-1], projection, x)
        or sizes_behind(links, x) != sizes_behind(shortcut, x)
    ):
        return None
    counts = values_a_channel(links, x) + values_a_channel(shortcut, x)
    return Convolutions(links, projection, counts) if min(counts) > 1 else None


def _is_plain(link: Link, x: Tensor) -> bool:
    return (
        is_standard(link)
        and link.conv.bias is None
        and link.uses_batch
        and link.bn.weight.device == link.conv.weight.device == x.device
        and x.dtype == computed_dtype(link, x)
    )


def _run_segment(convolutions: Convolutions, x: Tensor, branches: Branches | None) -> Branches:
    """The join of ``branches`` (the block's input ``x`` where there are none yet) and the
    convolutions behind it."""
    links, projection, counts = convolutions
    if branches is None:
        join, head = None, [x]
    else:
        last, residual = branches
        dual = isinstance(residual, PendingBatchNorm)
        join = Join(last.eps, residual.eps if dual else None)
        head = [*last[:5], *(residual[:5] if dual else [residual])]
    weights = [link.conv.weight for link in convolutions.every]
    norms = [vector for link in links[:-1] for vector in (link.bn.weight, link.bn.bias)]
    y, shortcut, *statistics = _Segment.apply(convolutions, join, *head, *weights, *norms)
    remember(convolutions.every, statistics, counts)
    if projection is not None:
        shortcut = _pending(projection, shortcut, *statistics[-2:])
    last = 2 * len(links) - 2
    return Branches(_pending(links[-1], y, *statistics[last : last + 2]), shortcut)


def _pending(link: Link, y: Tensor, mean: Tensor, var: Tensor) -> PendingBatchNorm:
    return PendingBatchNorm(y, mean, var, link.bn.weight, link.bn.bias, link.bn.eps, True)


class _Segment(torch.autograd.Function):
    """forward(convolutions, join, *head, *weights, *norms) returns the raw output of the last
    convolution, that of the projection (without one, the join's output), and mean and biased
    variance behind each convolution.

    head: the block's input, or of the last batch norm in front its input, mean, var, weight and
    bias, and of the shortcut the same, or just itself. weights: those of all convolutions. norms:
    weight and bias of the batch norms between them.
    """

    @staticmethod
    def forward(ctx: Any, convolutions: Convolutions, join: Join | None, *tensors: Tensor):
        links, projection, _ = convolutions
        head, weights, norms = _parts(convolutions, join, tensors)
        x, mask = (head[0], None) if join is None else _joined(join, head)
        weights = [_as_filter(weight, x) for weight in weights]
        inputs, between, statistics = [x], [], []
        for index, link in enumerate(links):
            y, mean, var = conv_graph.conv_stats(inputs[-1], weights[index], _geometry(link))
            statistics += [mean, var]
            if link is not links[-1]:
                vectors = (mean, var, *(v.float() for v in norms[2 * index : 2 * index + 2]))
                z = torch.ops.fastresnet.bn_relu.default(y, *vectors, link.bn.eps, True)
                inputs.append(z)
                between += [y, *vectors]
        shortcut = x
        if projection is not None:
            shortcut, *found = conv_graph.conv_stats(x, weights[-1], _geometry(projection))
            statistics += found
        ctx.convolutions, ctx.join = convolutions, join
        ctx.eps = [link.bn.eps for link in links]  # of the forward, whatever becomes of the modules
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(*head, mask, *weights, *inputs, *between)
        return y, shortcut, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, shortcut_grad: Tensor, *_statistics):
        convolutions, join = ctx.convolutions, ctx.join
        links, projection, _ = convolutions
        saved = iter(ctx.saved_tensors)
        head = _take(saved, 1 if join is None else join.tensors)
        (mask,) = _take(saved, 1)
        weights, inputs = _take(saved, len(convolutions.every)), _take(saved, len(links))
        between = [Normalized(*_take(saved, 5), eps, True) for eps in ctx.eps[:-1]]

        grad, addend = (
            g.contiguous(memory_format=torch.channels_last) for g in (grad, shortcut_grad)
        )
        wanted = ctx.needs_input_grad[2 + len(head) :]

        def wgrad(index: int, link: Link, grad: Tensor, x: Tensor) -> Tensor | None:
            if not wanted[index]:
                return None
            return conv_graph.wgrad(grad, x, weights[index], _geometry(link))

        dweights: list[Tensor | None] = [None] * len(weights)
        if projection is not None:
            dweights[-1] = wgrad(-1, projection, addend, inputs[0])
            addend = conv_graph.dgrad(addend, weights[-1], inputs[0], _geometry(projection))
        dnorms: list[Tensor] = []
        for index in reversed(range(1, len(links))):
            dweights[index] = wgrad(index, links[index], grad, inputs[index])
            result = conv_graph.dgrad_bn_relu(
                grad, weights[index], between[index - 1], _geometry(links[index])
            )
            grad = result.x
            dnorms = [result.weight, result.bias, *dnorms]
        dweights[0] = wgrad(0, links[0], grad, inputs[0])
        dhead = _head_gradients(ctx, grad, weights[0], addend, mask, head)
        return None, None, *dhead, *dweights, *dnorms


def _parts(
    convolutions: Convolutions, join: Join | None, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """head, weights and norms."""
    rest = iter(tensors)
    head = _take(rest, 1 if join is None else join.tensors)
    return head, _take(rest, len(convolutions.every)), list(rest)


def _take(tensors: Iterator[Tensor], count: int) -> list[Tensor]:
    return list(itertools.islice(tensors, count))


def _geometry(link: Link) -> Geometry:
    return Geometry(**link.geometry)


def _as_filter(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(dtype=x.dtype, memory_format=torch.channels_last)


def _joined(join: Join, head: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The output and mask of the join in front."""
    own = (*head[:3], *(vector.float() for vector in head[3:5]))
    if join.residual_eps is None:
        return torch.ops.fastresnet.bn_add_relu.default(*own, head[5], join.eps, True)
    other = (*head[5:8], *(vector.float() for vector in head[8:]))
    return torch.ops.fastresnet.bn_add_bn_relu.default(
        *own, *other, join.eps, join.residual_eps, True
    )


def _head_gradients(
    ctx: Any, grad: Tensor, weight: Tensor, addend: Tensor, mask: Tensor, head: list[Tensor]
) -> list[Tensor | None]:
    """Those of ``head``, from ``grad``, that of the first convolution's output, and ``addend``,
    that of the shortcut."""
    join, geometry = ctx.join, _geometry(ctx.convolutions.links[0])
    if join is None:
        wanted = ctx.needs_input_grad[2]
        return [conv_graph.dgrad_add(grad, weight, addend, geometry) if wanted else None]
    x = Normalized(*head[:3], *(vector.float() for vector in head[3:5]), join.eps, True)
    residual = None
    if join.residual_eps is not None:
        vectors = (vector.float() for vector in head[8:])
        residual = Normalized(*head[5:8], *vectors, join.residual_eps, True)
    result = conv_graph.dgrad_join(grad, weight, addend, mask, x, residual, geometry)
    own = [result.x, None, None, result.weight, result.bias]
    if residual is None:
        return [*own, result.residual]
    # Both biases shift the same sum, so they have the same gradient; autograd wants two tensors.
    return [*own, result.residual, None, None, result.residual_weight, result.bias.clone()]
