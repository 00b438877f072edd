# SPDX-License-Identifier: Apache-2.0
"""A residual block as one autograd node on convolutions of our own.

Between two convolutions of a block nothing is stored but the first one's raw output: its batch norm
and ReLU are computed as the second reads it, forward and backward. Saved for backward are the
block's input, the raw outputs, vectors, and one bit for each value of the block's output.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..ops import Normalized
from .batch_norm import _is_transformed, _update_running_stats, has_hooks
from .sequential import FusedSequential


class Link(NamedTuple):
    """A convolution and the batch norm behind it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d

    @property
    def geometry(self) -> dict[str, int]:
        conv = self.conv
        return {
            "stride": conv.stride[0],
            "padding": conv.padding[0],
            "dilation": conv.dilation[0],
            "groups": conv.groups,
        }


def residual_block(
    links: list[Link], relu: nn.Module, downsample: nn.Module | None, x: Tensor
) -> Tensor | None:
    """The whole block as one node, or None (and nothing done) where something asks for more: a
    hook, a tracer, a module of another class, a convolution that the kernels do not take.

    Args:
        links: the block's convolutions with their batch norms, in order.
        relu: between the links and at the end.
        downsample: the shortcut, None for the identity.
        x: [N, C, H, W].
    """
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or _is_transformed(x)
        or type(relu) is not nn.ReLU
        or has_hooks(relu)
    ):
        return None
    projection = _as_link(downsample) if downsample is not None else None
    if downsample is not None and projection is None:
        return None
    every = links if projection is None else [*links, projection]
    if not all(_is_plain(link, x) for link in every):
        return None
    counts = _values_a_channel(links, projection, x)
    # Torch has its own words for one value a channel, and for branches that do not fit.
    if min(counts) < 2 or not _channels_fit(links, projection, x):
        return None
    if projection is None and counts[-1] * x.shape[1] != x.numel():
        return None
    if projection is not None and _uses_batch(projection.bn) != _uses_batch(links[-1].bn):
        return None

    parameters = [
        parameter
        for link in every
        for parameter in (link.conv.weight, link.bn.weight, link.bn.bias)
    ]
    out, *statistics = _ResidualBlock.apply(links, projection, x, *parameters)
    for index, link in enumerate(every):
        if link.bn.training and link.bn.track_running_stats:
            mean, var = statistics[2 * index : 2 * index + 2]
            _update_running_stats(link.bn, mean, var, counts[index])
    return out


def _values_a_channel(links: list[Link], projection: Link | None, x: Tensor) -> list[int]:
    """How many values each channel of each link's output has."""
    counts = []
    sizes = x.shape[2:]
    for link in links:
        sizes = _output_sizes(link.conv, sizes)
        counts.append(x.shape[0] * sizes[0] * sizes[1])
    if projection is not None:
        # The ends of both branches must have one shape to be added.
        counts.append(counts[-1] if _output_sizes(projection.conv, x.shape[2:]) == sizes else 0)
    return counts


def _output_sizes(conv: nn.Conv2d, sizes: Iterable[int]) -> list[int]:
    (stride, *_), (padding, *_), (dilation, *_) = conv.stride, conv.padding, conv.dilation
    return [
        max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
        for size, kernel in zip(sizes, conv.kernel_size, strict=True)
    ]


def _channels_fit(links: list[Link], projection: Link | None, x: Tensor) -> bool:
    channels = x.shape[1]
    for link in links:
        if link.conv.in_channels != channels:
            return False
        channels = link.conv.out_channels
    if projection is None:
        return channels == x.shape[1]
    return (projection.conv.in_channels, projection.conv.out_channels) == (x.shape[1], channels)


def _uses_batch(bn: nn.BatchNorm2d) -> bool:
    """Whether it normalises by the batch's own statistics."""
    return bn.training or bn.running_mean is None


def _as_link(downsample: nn.Module) -> Link | None:
    if type(downsample) not in (nn.Sequential, FusedSequential) or has_hooks(downsample):
        return None
    return Link(*downsample) if len(downsample) == 2 else None


def _is_plain(link: Link, x: Tensor) -> bool:
    conv, bn = link
    if (
        type(conv) is not nn.Conv2d
        or type(bn) is not nn.BatchNorm2d
        or has_hooks(conv)
        or has_hooks(bn)
        or conv.bias is not None
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
        or bn.weight is None
        or bn.bias is None
        or (bn.running_mean is None) != (bn.running_var is None)
        or bn.num_features != conv.out_channels
    ):
        return False
    if any(len(set(sizes)) > 1 for sizes in (conv.stride, conv.padding, conv.dilation)):
        return False
    # What torch's convolution would compute in.
    dtype = (
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else conv.weight.dtype
    )
    return (
        x.dtype == dtype
        and conv.stride[0] <= 4
        and bn.weight.device == x.device
        and ops.has_conv_kernel(x, conv.weight, conv.groups)
    )


class _ResidualBlock(torch.autograd.Function):
    """forward(links, projection, x, *(conv weight, bn weight, bn bias of each link)) returns the
    block's output and mean and biased variance of each link's."""

    @staticmethod
    def forward(ctx: Any, links: list[Link], projection: Link | None, x: Tensor, *parameters):
        every = links if projection is None else [*links, projection]
        outputs: list[Normalized] = []
        for index, link in enumerate(every):
            conv_weight, bn_weight, bn_bias = parameters[3 * index : 3 * index + 3]
            chained = 0 < index < len(links)
            y, mean, var = ops.conv_stats(
                outputs[-1] if chained else x, conv_weight, **link.geometry
            )
            training = _uses_batch(link.bn)
            if not training:
                mean, var = link.bn.running_mean.float(), link.bn.running_var.float()
            outputs.append(
                Normalized(y, mean, var, bn_weight.float(), bn_bias.float(), link.bn.eps, training)
            )
        last = outputs[len(links) - 1]
        if projection is None:
            out, mask = torch.ops.fastresnet.bn_add_relu.default(
                *last[:5], x, last.eps, last.training
            )
        else:
            shortcut = outputs[-1]
            out, mask = torch.ops.fastresnet.bn_add_bn_relu.default(
                *last[:5], *shortcut[:5], last.eps, shortcut.eps, last.training
            )
        ctx.links, ctx.projection = links, projection
        ctx.rest = [(output.eps, output.training) for output in outputs]
        ctx.save_for_backward(
            x,
            mask,
            *(parameters[0::3]),
            *(tensor for output in outputs for tensor in output[:5]),
        )
        statistics = [vector for output in outputs for vector in (output.mean, output.var)]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return out, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_statistics):
        links, projection = ctx.links, ctx.projection
        count = len(ctx.rest)
        if grad is None:
            return (None,) * (3 + 3 * count)
        x, mask, *saved = ctx.saved_tensors
        weights, saved = saved[:count], saved[count:]
        outputs = [Normalized(*saved[5 * i : 5 * i + 5], *ctx.rest[i]) for i in range(count)]
        grad = grad.contiguous(memory_format=torch.channels_last)
        wants_dx = ctx.needs_input_grad[2]
        gradients: list[Tensor | None] = [None] * (3 * count)

        last = outputs[len(links) - 1]
        shortcut = outputs[-1] if projection is not None else None
        sums, shortcut_sums = ops.bn_sums(
            *(grad, mask, last.x, last.mean),
            *((shortcut.x, shortcut.mean) if shortcut is not None else ()),
        )
        # What reaches x by the shortcut: the masked gradient itself, or its way back through the
        # projection.
        addend, addend_mask = grad, mask
        if shortcut is not None:
            result = ops.conv_bn_backward(
                *(grad, mask, shortcut_sums, shortcut, x, weights[-1]),
                **projection.geometry,
                wants_dx=wants_dx,
            )
            gradients[-3:] = result[1:4]
            addend, addend_mask = result.x, None
        for index in reversed(range(len(links))):
            first = index == 0
            result = ops.conv_bn_backward(
                *(grad, mask, sums, outputs[index]),
                *(x if first else outputs[index - 1], weights[index]),
                **links[index].geometry,
                addend=addend if first and wants_dx else None,
                addend_mask=addend_mask if first and wants_dx else None,
                wants_dx=wants_dx or not first,
            )
            gradients[3 * index : 3 * index + 3] = result[1:4]
            grad, mask, sums = result.x, None, result.sums
        return None, None, result.x, *gradients
