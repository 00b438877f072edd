# SPDX-License-Identifier: Apache-2.0
"""Convolutions with the batch norm behind them, as the nodes of :mod:`fastresnet.nn.residual` and
:mod:`fastresnet.nn.chain` run them: which ones the kernels take, and their forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import ConvGradients, Normalized
from .batch_norm import has_hooks, is_transformed
from .join import Settings
from .running_stats import Seen

_LEAST_CHANNELS = 16  # fewer would fill the kernels' blocks with zeros
_LARGEST_PATCH = 512  # values; kLargestPatch of csrc/cpu/conv_params.h


class Link(NamedTuple):
    """A convolution and the batch norm behind it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d

    @property
    def geometry(self) -> dict[str, int]:
        """The convolution's arguments to the operators."""
        conv = self.conv
        return {
            "stride": conv.stride[0],
            "padding": conv.padding[0],
            "dilation": conv.dilation[0],
            "groups": conv.groups,
        }

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Weight and bias of the convolution, weight and bias of the batch norm."""
        return self.conv.weight, self.conv.bias, self.bn.weight, self.bn.bias

    @property
    def uses_batch(self) -> bool:
        """Whether the batch norm normalises by the batch's own statistics."""
        return self.bn.training or self.bn.running_mean is None

    def output_sizes(self, sizes: Iterable[int]) -> list[int]:
        """Height and width of the convolution's output."""
        conv = self.conv
        (stride, *_), (padding, *_), (dilation, *_) = conv.stride, conv.padding, conv.dilation
        return [
            max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
            for size, kernel in zip(sizes, conv.kernel_size, strict=True)
        ]

    @property
    def settings(self) -> Settings:
        """The batch norm's. A node is given them: ``torch.compile(dynamic=True)`` makes an input of
        a float where it is first looked at, which may not be inside of a node."""
        return float(self.bn.eps), self.uses_batch

    def forward(
        self,
        settings: Settings,
        x: Tensor | Normalized,
        weight: Tensor,
        bias: Tensor | None,
        *affine: Tensor,
    ) -> Normalized:
        """The convolution's output, to be normalised by whoever reads it.

        A batch norm takes a bias of the convolution away again, so none is added: it counts in the
        mean only.
        """
        y, mean, var = ops.launch_conv_stats(x, weight, **self.geometry)
        _eps, uses_batch = settings
        if not uses_batch:
            mean, var = self.bn.running_mean.float(), self.bn.running_var.float()
            mean = mean if bias is None else mean - bias.float()
        return _normalized(y, mean, var, affine, settings)

    def normalized(self, settings: Settings, y: Tensor, mean: Tensor, var: Tensor) -> Normalized:
        """What :meth:`forward` returned, of its tensors that a node hands out; not
        differentiable."""
        affine = [vector.detach() for vector in (self.bn.weight, self.bn.bias)]
        return _normalized(y, mean, var, affine, settings)

    def gradients(self, result: ConvGradients, y: Normalized) -> tuple[Tensor | None, ...]:
        """Those of :attr:`parameters`, from the backward of convolution and batch norm."""
        bias = None
        if self.conv.bias is not None and y.training:
            bias = torch.zeros_like(self.conv.bias)
        elif self.conv.bias is not None:
            bias = result.bn_bias * y.weight * (y.var + y.eps).rsqrt()
        return result.weight, bias, result.bn_weight, result.bn_bias

    def seen(self, mean: Tensor, var: Tensor, count: int) -> Seen:
        """The batch as the batch norm sees it, whose input has the convolution's bias in it."""
        if self.conv.bias is not None:
            mean = mean + self.conv.bias.detach().float()
        return Seen(self.bn, mean, var, count)


def _normalized(
    y: Tensor, mean: Tensor, var: Tensor, affine: Sequence[Tensor], settings: Settings
) -> Normalized:
    bn_weight, bn_bias = (vector.float() for vector in affine)
    return Normalized(y, mean, var, bn_weight, bn_bias, *settings)


def forward_links(
    links: Sequence[Link],
    settings: Sequence[Settings],
    x: Tensor,
    parameters: Sequence[Tensor | None],
) -> list[Normalized]:
    """The outputs of links one behind another, given settings and parameters of each."""
    outputs: list[Normalized] = []
    for index, link in enumerate(links):
        source = outputs[-1] if outputs else x
        own = parameters[4 * index : 4 * index + 4]
        outputs.append(link.forward(settings[index], source, *own))
    return outputs


def batches_seen(
    links: Sequence[Link], statistics: Sequence[Tensor], counts: Sequence[int]
) -> list[Seen]:
    """What there is to remember, where running statistics are kept.

    Args:
        statistics: mean and biased variance of each link's output.
        counts: how many values each channel of those has.
    """
    means_and_vars = zip(statistics[::2], statistics[1::2], strict=True)
    return [
        link.seen(*pair, count)
        for link, pair, count in zip(links, means_and_vars, counts, strict=True)
        if link.bn.training and link.bn.track_running_stats
    ]


def save_for_backward(
    ctx: Any, links: Sequence[Link], outputs: Sequence[Normalized], *others: Tensor
) -> list[Tensor]:
    """Saves the links' weights and outputs, and other tensors, in a node's context.

    Returns:
        Mean and variance of each link's output, which the node returns too.
    """
    statistics = [vector for output in outputs for vector in (output.mean, output.var)]
    ctx.set_materialize_grads(False)
    ctx.others = len(others)
    ctx.rest = [(output.eps, output.training) for output in outputs]
    vectors = (tensor for output in outputs for tensor in output[:5])
    ctx.save_for_backward(*others, *(link.conv.weight for link in links), *vectors)
    return statistics


def saved_tensors(ctx: Any) -> tuple[list[Tensor], list[Tensor], list[Normalized]]:
    """The other tensors, the weights, the outputs that :func:`save_for_backward` saved."""
    saved, count = list(ctx.saved_tensors), len(ctx.rest)
    others, weights = saved[: ctx.others], saved[ctx.others : ctx.others + count]
    others, vectors = map(ops.as_kernels_take, (others, saved[ctx.others + count :]))
    outputs = [Normalized(*vectors[5 * i : 5 * i + 5], *ctx.rest[i]) for i in range(count)]
    return others, weights, outputs


def runs_as_node(x: Tensor) -> bool:
    """Whether something is there to be differentiated, and nothing that would look inside."""
    return torch.is_grad_enabled() and not is_traced_elsewhere(x) and not is_transformed(x)


def is_traced_elsewhere(x: Tensor) -> bool:
    """Whether this is traced for a graph that convolutions of our own have no place in: those of
    other devices, and exported ones, which are for other runtimes. torch.compile before 2.12 calls
    every trace an export.
    """
    return torch.compiler.is_compiling() and (
        x.device.type != "cpu" or torch.compiler.is_exporting()
    )


def is_plain(link: Link, x: Tensor) -> bool:
    """Whether the kernels can take over both modules at an input like ``x``."""
    conv, bn = link
    return (
        is_standard(link)
        and bn.weight.device == x.device
        and ops.has_conv_kernel(x, conv.weight, stride=conv.stride[0], groups=conv.groups)
        and x.dtype == computed_dtype(link, x)
    )


def is_untouched(link: Link) -> bool:
    """Whether both modules are torch's own, and nobody would notice that they were not called."""
    conv, bn = link
    return not (
        type(conv) is not nn.Conv2d
        or type(bn) is not nn.BatchNorm2d
        or has_hooks(conv)
        or has_hooks(bn)
    )


def is_standard(link: Link) -> bool:
    """Whether both modules are untouched and do what every kernel does."""
    conv, bn = link
    return is_untouched(link) and not (
        conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
        or bn.weight is None
        or bn.bias is None
        or (bn.running_mean is None) != (bn.running_var is None)
        or bn.num_features != conv.out_channels
        # Torch takes a number set afterwards, where the constructor makes a pair of it.
        or any(
            isinstance(sizes, int) or len(set(sizes)) > 1
            for sizes in (conv.stride, conv.padding, conv.dilation)
        )
    )


def computed_dtype(link: Link, x: Tensor) -> torch.dtype:
    """What torch's convolution of ``x`` would compute in."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return link.conv.weight.dtype


def under_autocast(link: Link, x: Tensor) -> Tensor:
    """What autocast on the CPU hands to the convolution, of images, which have no gradient."""
    device = x.device.type
    if x.requires_grad or device != "cpu" or not torch.is_autocast_enabled(device):
        return x
    dtype = computed_dtype(link, x)
    return x.to(dtype) if x.dtype != dtype and is_standard(link) and ops.has_kernel(x) else x


def fills_blocks(link: Link, x: Tensor, is_input: bool) -> bool:
    """Whether the CPU's kernels have enough to do: channels or, where the link's input is ``x``,
    patches of what has no gradient."""
    conv = link.conv
    if conv.in_channels >= _LEAST_CHANNELS:
        return True
    patch = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    is_plain_input = is_input and not x.requires_grad
    return is_plain_input and conv.groups == conv.dilation[0] == 1 and patch <= _LARGEST_PATCH


def channels_fit(links: Sequence[Link], x: Tensor) -> bool:
    """Whether each link takes what the one before it gives."""
    channels = x.shape[1]
    for link in links:
        if link.conv.in_channels != channels:
            return False
        channels = link.conv.out_channels
    return True


def sizes_behind(links: Sequence[Link], x: Tensor) -> list[int]:
    """Height and width of the last link's output; those of ``x`` where there are no links."""
    sizes = list(x.shape[2:])
    for link in links:
        sizes = link.output_sizes(sizes)
    return sizes


def branches_fit(links: Sequence[Link], shortcut: Sequence[Link], x: Tensor) -> bool:
    """Whether each link takes what the one before it gives, and both branches end with the same
    channels, sizes and kind of statistics; an empty shortcut is ``x`` itself."""
    last = links[-1]
    channels = shortcut[-1].conv.out_channels if shortcut else x.shape[1]
    return (
        channels_fit(links, x)
        and channels_fit(shortcut, x)
        and last.conv.out_channels == channels
        and all(link.uses_batch == last.uses_batch for link in shortcut)
        and sizes_behind(links, x) == sizes_behind(shortcut, x)
    )


def values_a_channel(links: Sequence[Link], x: Tensor) -> list[int]:
    """How many values each channel of each link's output has."""
    counts = []
    sizes = x.shape[2:]
    for link in links:
        sizes = link.output_sizes(sizes)
        counts.append(x.shape[0] * sizes[0] * sizes[1])
    return counts
