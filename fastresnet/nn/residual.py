# SPDX-License-Identifier: Apache-2.0
"""A residual block as one autograd node on convolutions of our own.

Between two convolutions of a block nothing is stored but the first one's raw output: its batch norm
and ReLU are computed as the second reads it, forward and backward. Saved for backward are the
block's input, the raw outputs, vectors, and one bit for each value of the block's output.

Of blocks one behind another, every other input is not saved either: it is a sum of what the block
in front has saved, and computed anew from that, in a pass over memory (as in Chen et al., "Training
Deep Nets with Sublinear Memory Cost", 2016).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from .batch_norm import has_hooks
from .join import Join, Settings, put_together, taken_apart
from .links import (
    Link,
    batches_seen,
    branches_fit,
    forward_links,
    is_plain,
    runs_as_node,
    save_for_backward,
    saved_tensors,
    values_a_channel,
)
from .running_stats import Seen
from .sequential import FusedSequential


class Output(NamedTuple):
    """A block's output, what it is made of, and what its batch norms have to remember."""

    out: Tensor
    join: Join
    seen: list[Seen]


def residual_block(
    links: list[Link],
    relu: nn.Module,
    downsample: nn.Module | None,
    x: Tensor,
    source: Join | None = None,
) -> Output | None:
    """The whole block as one node, or None (and nothing done) where something asks for more: a
    hook, a tracer, a module of another class, a convolution that the kernels do not take.

    Args:
        links: the block's convolutions with their batch norms, in order.
        relu: between the links and at the end.
        downsample: the shortcut, None for the identity.
        x: [N, C, H, W].
        source: what ``x`` is made of, to be saved instead of it.
    """
    if not runs_as_node(x) or type(relu) is not nn.ReLU or has_hooks(relu):
        return None
    projection = as_link(downsample) if downsample is not None else None
    if downsample is not None and projection is None:
        return None
    every = links if projection is None else [*links, projection]
    if not all(is_plain(link, x) for link in every):
        return None
    shortcut = [] if projection is None else [projection]
    if not branches_fit(links, shortcut, x):
        return None
    counts = values_a_channel(links, x) + values_a_channel(shortcut, x)
    if min(counts) < 2:  # for which torch has words of its own
        return None

    parameters = [parameter for link in every for parameter in link.parameters]
    settings = [link.settings for link in every]
    out, *made = _ResidualBlock.apply(links, projection, settings, source, x, *parameters)
    ends, statistics = made[: 1 + len(shortcut)], made[1 + len(shortcut) :]
    last = len(links) - 1
    branch = links[last].normalized(settings[last], ends[0], *statistics[2 * last : 2 * last + 2])
    projected = [link.normalized(settings[-1], ends[1], *statistics[-2:]) for link in shortcut]
    join = Join(branch, *(projected or [x]))
    return Output(out, join, batches_seen(every, statistics, counts))


def as_link(downsample: nn.Module) -> Link | None:
    """A shortcut of a convolution and a batch norm as a link; None for any other."""
    if type(downsample) not in (nn.Sequential, FusedSequential) or has_hooks(downsample):
        return None
    if len(downsample) != 2:
        return None
    link = Link(*downsample)
    return link if type(link.conv) is nn.Conv2d and type(link.bn) is nn.BatchNorm2d else None


class _ResidualBlock(torch.autograd.Function):
    """forward(links, projection, settings, source, x, *(the parameters of each link)) returns the
    block's output, the raw outputs at the end of its branches, and mean and biased variance of each
    link's."""

    @staticmethod
    def forward(
        ctx: Any,
        links: list[Link],
        projection: Link | None,
        settings: list[Settings],
        source: Join | None,
        x: Tensor,
        *parameters: Tensor | None,
    ):
        outputs = forward_links(links, settings, x, parameters)
        shortcut = x
        if projection is not None:
            shortcut = projection.forward(settings[-1], x, *parameters[-4:])
            outputs.append(shortcut)
        join = Join(outputs[len(links) - 1], shortcut)
        out, mask = join.forward()
        every = links if projection is None else [*links, projection]
        ctx.links, ctx.projection = links, projection
        head, ctx.of_head = ([x], None) if source is None else taken_apart(source)
        statistics = save_for_backward(ctx, every, outputs, mask, *head)
        ends = [output.x for output in outputs[len(links) - 1 :]]
        ctx.mark_non_differentiable(*ends, *statistics)
        return out, *ends, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_others):
        links, projection = ctx.links, ctx.projection
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        (mask, *head), weights, outputs = saved_tensors(ctx)
        x = head[0] if ctx.of_head is None else put_together(head, ctx.of_head).forward()[0]
        gradients: list[Tensor | None] = [None] * (4 * len(outputs))
        grad = grad.contiguous(memory_format=torch.channels_last)
        wants_dx = ctx.needs_input_grad[4]

        last = outputs[len(links) - 1]
        shortcut = outputs[-1] if projection is not None else None
        # Past `ops.bn_sums`, which asks for layouts: torch.compile lets no backward do that.
        sums, shortcut_sums = torch.ops.fastresnet.bn_sums.default(
            *(grad, mask, last.x, last.mean),
            *((None, None) if shortcut is None else (shortcut.x, shortcut.mean)),
        )
        # What reaches x by the shortcut: the masked gradient itself, or its way back through the
        # projection.
        addend, addend_mask = grad, mask
        if shortcut is not None:
            result = ops.launch_conv_bn_backward(
                *(grad, mask, shortcut_sums, shortcut, x, weights[-1]),
                **projection.geometry,
                wants_dx=wants_dx,
            )
            gradients[-4:] = projection.gradients(result, shortcut)
            addend, addend_mask = result.x, None
        for index in reversed(range(len(links))):
            first = index == 0
            result = ops.launch_conv_bn_backward(
                *(grad, mask, sums, outputs[index]),
                *(x if first else outputs[index - 1], weights[index]),
                **links[index].geometry,
                addend=addend if first and wants_dx else None,
                addend_mask=addend_mask if first and wants_dx else None,
                wants_dx=wants_dx or not first,
            )
            gradients[4 * index : 4 * index + 4] = links[index].gradients(result, outputs[index])
            grad, mask, sums = result.x, None, result.sums
        return None, None, None, None, result.x, *gradients
