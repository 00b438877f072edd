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
from .join import Join, Settings, put_together, taken_apart
from .links import (
    Link,
    batches_seen,
    branches_fit,
    computed_dtype,
    is_standard,
    sizes_behind,
    values_a_channel,
)
from .residual import as_link
from .running_stats import Seen, update_running_stats


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
    seen: list[Seen] = []
    for convolutions in found:
        branches, of_segment = _run_segment(convolutions, x, branches)
        seen += of_segment
    update_running_stats(seen)
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
        or not branches_fit(links, shortcut, x)
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


def _run_segment(
    convolutions: Convolutions, x: Tensor, branches: Branches | None
) -> tuple[Branches, list[Seen]]:
    """The join of ``branches`` (the block's input ``x`` where there are none yet) and the
    convolutions behind it; and what their batch norms have to remember."""
    links, projection, counts = convolutions
    head, settings = ([x], None) if branches is None else taken_apart(_join(branches))
    weights = [link.conv.weight for link in convolutions.every]
    norms = [vector for link in links[:-1] for vector in (link.bn.weight, link.bn.bias)]
    y, shortcut, *statistics = _Segment.apply(convolutions, settings, *head, *weights, *norms)
    seen = batches_seen(convolutions.every, statistics, counts)
    if projection is not None:
        shortcut = _pending(projection, shortcut, *statistics[-2:])
    last = 2 * len(links) - 2
    return Branches(_pending(links[-1], y, *statistics[last : last + 2]), shortcut), seen


def _join(branches: Branches) -> Join:
    parts = (Normalized(*b) if isinstance(b, PendingBatchNorm) else b for b in branches)
    return Join(*parts)


def _pending(link: Link, y: Tensor, mean: Tensor, var: Tensor) -> PendingBatchNorm:
    return PendingBatchNorm(y, mean, var, link.bn.weight, link.bn.bias, link.bn.eps, True)


class _Segment(torch.autograd.Function):
    """forward(convolutions, settings, *head, *weights, *norms) returns the raw output of the last
    convolution, that of the projection (without one, the join's output), and mean and biased
    variance behind each convolution.

    settings and head: those of the join in front (:func:`fastresnet.nn.join.taken_apart`), or None
    and the block's input. weights: those of all convolutions. norms: weight and bias of the batch
    norms between them.
    """

    @staticmethod
    def forward(
        ctx: Any, convolutions: Convolutions, settings: list[Settings] | None, *tensors: Tensor
    ):
        links, projection, _ = convolutions
        head, weights, norms = _parts(convolutions, tensors)
        x, mask = (head[0], None) if settings is None else _join_in_front(head, settings).forward()
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
        ctx.convolutions, ctx.settings = convolutions, settings
        ctx.eps = [link.bn.eps for link in links]  # of the forward, whatever becomes of the modules
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(mask, *weights, *inputs, *between, *head)
        return y, shortcut, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, shortcut_grad: Tensor, *_statistics):
        convolutions = ctx.convolutions
        links, projection, _ = convolutions
        mask, *saved = ctx.saved_tensors
        saved = iter(saved)
        weights, inputs = _take(saved, len(convolutions.every)), _take(saved, len(links))
        inputs = ops.as_kernels_take(inputs)
        between = [
            Normalized(*ops.as_kernels_take(_take(saved, 5)), eps, True) for eps in ctx.eps[:-1]
        ]
        head = ops.as_kernels_take(saved)

        grad, addend = (
            g.contiguous(memory_format=torch.channels_last) for g in (grad, shortcut_grad)
        )
        wanted = ctx.needs_input_grad[2 + len(head) :][: len(weights)]

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
    convolutions: Convolutions, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """head, weights and norms."""
    rest = iter(tensors)
    weights, norms = len(convolutions.every), 2 * len(convolutions.links) - 2
    head = _take(rest, len(tensors) - weights - norms)
    return head, _take(rest, weights), list(rest)


def _take(tensors: Iterator[Tensor], count: int) -> list[Tensor]:
    return list(itertools.islice(tensors, count))


def _geometry(link: Link) -> Geometry:
    return Geometry(**link.geometry)


def _as_filter(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(dtype=x.dtype, memory_format=torch.channels_last)


def _join_in_front(head: Sequence[Tensor], settings: Sequence[Settings]) -> Join:
    """With weights and biases as the kernels take them."""
    parts = (
        part._replace(weight=part.weight.float(), bias=part.bias.float())
        if isinstance(part, Normalized)
        else part
        for part in put_together(head, settings)
    )
    return Join(*parts)


def _head_gradients(
    ctx: Any, grad: Tensor, weight: Tensor, addend: Tensor, mask: Tensor, head: list[Tensor]
) -> list[Tensor | None]:
    """Those of ``head``, from ``grad``, that of the first convolution's output, and ``addend``,
    that of the shortcut."""
    geometry = _geometry(ctx.convolutions.links[0])
    if ctx.settings is None:
        wanted = ctx.needs_input_grad[2]
        return [conv_graph.dgrad_add(grad, weight, addend, geometry) if wanted else None]
    x, shortcut = _join_in_front(head, ctx.settings)
    residual = shortcut if isinstance(shortcut, Normalized) else None
    result = conv_graph.dgrad_join(grad, weight, addend, mask, x, residual, geometry)
    own = [result.x, None, None, result.weight, result.bias]
    if residual is None:
        return [*own, result.residual]
    # Both biases shift the same sum, so they have the same gradient; autograd wants two tensors.
    return [*own, result.residual, None, None, result.residual_weight, result.bias.clone()]
