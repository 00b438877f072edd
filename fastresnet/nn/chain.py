# SPDX-License-Identifier: Apache-2.0
"""Convolutions with batch norm and ReLU, one behind another, as one autograd node on convolutions
of our own: what lies between two pools of a VGG, and the stem of a ResNet.

As in :mod:`fastresnet.nn.residual`, only the raw outputs are stored between the convolutions. A
max-pool at the end is joined to the last batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..ops import Normalized
from .batch_norm import is_relu
from .join import Join, Settings
from .links import (
    Link,
    batches_seen,
    channels_fit,
    fills_blocks,
    forward_links,
    is_plain,
    runs_as_node,
    save_for_backward,
    saved_tensors,
    sizes_behind,
    under_autocast,
    values_a_channel,
)
from .running_stats import update_running_stats
from .windows import square_windows


def run_chain(modules: Sequence[nn.Module], x: Any) -> tuple[Any, int, Join | None]:
    """Runs the convolution, batch norm, ReLU triples that ``modules`` begins with, and a max-pool
    behind them, as one node.

    Args:
        modules: a sequence of any modules, each called with what the one before it returns.
        x: what the first is called with; chained is [N, C, H, W].

    Returns:
        The output, how many modules it is the output of, and what it is made of where it does not
        end with a pool; ``x``, 0 and None where there is no chain, or where something asks for
        more than the kernels do.
    """
    links: list[Link] = []
    while len(modules) >= 3 * len(links) + 3:
        conv, bn, relu = modules[3 * len(links) : 3 * len(links) + 3]
        if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d or not is_relu(relu):
            break
        links.append(Link(conv, bn))
    if not links or not isinstance(x, Tensor) or x.dim() != 4 or not runs_as_node(x):
        return x, 0, None
    images, x = x, under_autocast(links[0], x)
    if (
        not all(is_plain(link, x) for link in links)
        or not all(fills_blocks(link, x, index == 0) for index, link in enumerate(links))
        or not channels_fit(links, x)
        or min(counts := values_a_channel(links, x)) < 2
    ):
        return images, 0, None
    length = 3 * len(links)
    windows = square_windows(modules[length]) if len(modules) > length else None
    if windows is not None and not ops.has_max_pool_kernel(_like_output(links, x), **windows):
        windows = None
    parameters = [parameter for link in links for parameter in link.parameters]
    settings = [link.settings for link in links]
    out, *made = _Chain.apply(links, settings, windows, x, *parameters)
    statistics, source = made[-2 * len(links) :], None
    if windows is None:
        source = Join(links[-1].normalized(settings[-1], made[0], *statistics[-2:]), None)
    update_running_stats(batches_seen(links, statistics, counts))
    return out, length + (windows is not None), source if out.requires_grad else None


def _like_output(links: list[Link], x: Tensor) -> Tensor:
    """A tensor like the last link's output; never written, so that it takes no memory."""
    size = (x.shape[0], links[-1].conv.out_channels, *sizes_behind(links, x))
    return torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)


class _Chain(torch.autograd.Function):
    """forward(links, settings, windows, x, *(the parameters of each link)) returns the chain's
    output, the last raw one (not where a pool is behind it), and mean and biased variance of each
    link's."""

    @staticmethod
    def forward(
        ctx: Any,
        links: list[Link],
        settings: list[Settings],
        windows: dict[str, int] | None,
        x: Tensor,
        *parameters: Tensor | None,
    ):
        outputs = forward_links(links, settings, x, parameters)
        last = outputs[-1]
        ends, pooled = [], []
        if windows is None:
            ends = [last.x]
            out, _ = Join(last, None).forward()
        else:
            out, *pooled = torch.ops.fastresnet.bn_relu_max_pool.default(
                *last[:5], *windows.values(), last.eps, last.training
            )
        ctx.links, ctx.windows = links, windows
        statistics = save_for_backward(ctx, links, outputs, x, *pooled)
        ctx.mark_non_differentiable(*ends, *statistics)
        return out, *ends, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_others):
        links, windows = ctx.links, ctx.windows
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        (x, *pooled), weights, outputs = saved_tensors(ctx)
        gradients: list[Tensor | None] = [None] * (4 * len(links))
        grad = grad.contiguous(memory_format=torch.channels_last)
        last = outputs[-1]
        if windows is None:
            grad, bn_weight, bn_bias = torch.ops.fastresnet.bn_relu_backward.default(
                grad, *last[:5], last.eps, last.training
            )
        else:
            (index,) = pooled
            index = index.contiguous(memory_format=torch.channels_last)
            grad, bn_weight, bn_bias = torch.ops.fastresnet.bn_relu_max_pool_backward.default(
                grad, index, *last[:4], *windows.values(), last.eps, last.training
            )
        # The last batch norm's backward is done: to its convolution it is the identity.
        output = _identity(last.x)
        sums = grad.new_zeros((2, grad.shape[1]), dtype=torch.float64)
        for index in reversed(range(len(links))):
            wants_dx = index > 0 or ctx.needs_input_grad[3]
            result = ops.launch_conv_bn_backward(
                *(grad, None, sums, output, outputs[index - 1] if index else x, weights[index]),
                **links[index].geometry,
                wants_dx=wants_dx,
            )
            if index == len(links) - 1:
                result = result._replace(bn_weight=bn_weight, bn_bias=bn_bias)
            gradients[4 * index : 4 * index + 4] = links[index].gradients(result, outputs[index])
            grad, sums, output = result.x, result.sums, outputs[index - 1]
        return None, None, None, grad, *gradients


def _identity(x: Tensor) -> Normalized:
    """A batch norm in evaluation mode that changes nothing."""
    zero = x.new_zeros(x.shape[1], dtype=torch.float32)
    one = torch.ones_like(zero)
    return Normalized(x, zero, one, one, zero, 0.0, False)
