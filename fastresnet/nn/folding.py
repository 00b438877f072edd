# SPDX-License-Identifier: Apache-2.0
"""Batch norm folded into the convolution in front of it, for inference on
:func:`fastresnet.ops.conv_relu`.

A batch norm in evaluation mode multiplies each channel by a number and adds another: the
convolution's weight and bias can do that. The folded ones are made at the first inference and kept
until what they were made of changes: another tensor, another version of it, a step of an optimiser
(torch's fused ones leave the version as it is), ``train()``, ``eval()``, ``to()``, a forward with
gradients. What escapes all of these, such as a write through ``.data`` or the replay of a captured
training step between two inferences, is noticed at the next ``eval()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops
from .batch_norm import is_relu, is_transformed
from .links import (
    Link,
    branches_fit,
    channels_fit,
    computed_dtype,
    fills_blocks,
    is_standard,
    is_untouched,
    under_autocast,
)
from .windows import square_windows

_conv_settings = attrgetter(
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "padding_mode",
)
_bn_settings = attrgetter("num_features", "eps", "training")


class Fold(NamedTuple):
    """A convolution with the batch norm behind it in its weight and bias."""

    weight: Tensor | ops.PackedWeight
    bias: Tensor | None
    geometry: dict[str, int]

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """``conv(x) + residual``, and its ReLU."""
        weight, bias, geometry = self
        return ops.launch_conv_relu(x, weight, bias, residual, relu=relu, **geometry)


class Source(NamedTuple):
    """A link as it was when it was folded.

    Each of its tensors was kept, and a second one on its memory, so that neither can be another's
    by now.
    """

    settings: tuple[Any, ...]
    tensors: tuple[tuple[Tensor | None, int, Tensor | None], ...]

    @classmethod
    def of(cls, link: Link) -> Source:
        tensors = tuple(
            (t, 0, None) if t is None else (t, t._version, t.detach()) for t in _tensors(link)
        )
        # Copied because a stride may be a list, and be written to.
        return cls(deepcopy(_settings(link)), tensors)

    def is_still(self, link: Link) -> bool:
        """Whether ``link`` does what it did."""
        if not is_untouched(link) or _settings(link) != self.settings:
            return False
        for tensor, (source, version, alias) in zip(_registered(link), self.tensors, strict=True):
            if tensor is not source:
                return False
            if tensor is not None and (tensor._version != version or not alias.is_set_to(tensor)):
                return False
        return True


@dataclass(frozen=True, eq=False)
class Folds:
    """What links that run one behind another were folded to, and the shortcut around them.

    ``fits`` says that the dtype can hold them; ``shapes`` has those of the inputs that they were
    found to take.
    """

    links: list[Fold]
    shortcut: list[Fold]
    fits: bool
    sources: list[Source]
    context: tuple[Any, ...]
    shapes: set[torch.Size]


_folds: WeakKeyDictionary[nn.Conv2d, Folds] = WeakKeyDictionary()


class Foldable(nn.Module):
    """A module whose folds are made anew after ``train()``, ``eval()`` and ``to()``."""

    def train(self, mode: bool = True) -> Foldable:
        forget_folds(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Foldable:
        forget_folds(self)
        return super()._apply(fn, recurse)


def forget_folds(module: nn.Module) -> None:
    """Drops what was folded of the convolutions in ``module``."""
    if not torch.compiler.is_compiling() and _folds:
        for child in module.modules():
            _folds.pop(child, None)


def _forget_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _folds:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for conv, known in list(_folds.items()):
        if any(id(t) in stepped for source in known.sources for t, *_ in source.tensors):
            del _folds[conv]


register_optimizer_step_post_hook(_forget_stepped)


def run_folded(modules: Sequence[nn.Module], x: Any) -> tuple[Any, int]:
    """Runs the convolution, batch norm, ReLU triple that ``modules`` begins with as one call.

    Args:
        modules: a sequence of any modules, each called with what the one before it returns.
        x: what the first is called with; folded is [N, C, H, W].

    Returns:
        The output and how many modules it is the output of; ``x`` and 0 where there is no triple,
        where our own convolutions would be filled with zeros and, with cuDNN's, where a max-pool
        comes behind that reads the batch norm's input itself.
    """
    if not may_fold(x) or len(modules) < 3:
        return x, 0
    conv, bn, relu = modules[:3]
    if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d or not is_relu(relu):
        return x, 0
    link = Link(conv, bn)
    if not is_standard(link):
        return x, 0
    images, x = x, under_autocast(link, x)
    if _is_ours(link, x):
        suits = fills_blocks(link, x, is_input=True)
    else:
        suits = len(modules) == 3 or square_windows(modules[3]) is None
    folds = fold([link], None, x) if suits else None
    return (images, 0) if folds is None else (folds.links[0](x), 3)


def may_fold(x: Any) -> bool:
    """Whether nothing is differentiated, and nothing would look inside."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_transformed(x)
        and x.dim() == 4
        and not (x.dtype == torch.float16 and _is_captured(x))
    )


def fold(links: Sequence[Link], shortcut: Sequence[Link] | None, x: Tensor) -> Folds | None:
    """The folds for inputs like ``x``, None where something asks for more than the fused
    convolutions do.

    Args:
        links: one behind another; at least one.
        shortcut: what reaches the sum behind them from ``x``: a projection, or ``x`` itself where
            that is empty. Its bias is the last link's to add, so that it takes no pass. None where
            there is no sum.
        x: [N, C, H, W], as :func:`may_fold` takes it.
    """
    every = [*links, *(shortcut or ())]
    context = (
        *(len(links), None if shortcut is None else len(shortcut)),
        # Other devices have no fused convolutions, and some not even autocast to ask about.
        *(x.dtype, torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")),
        # On another stream the folds may not be computed yet.
        torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,
    )
    known = _known(every, context, x)
    if known is not None and x.shape in known.shapes:
        # The settings of torch and the layout of x are the same for all.
        takes = _takes(links[0], x)
    else:
        takes = all(_can_fold(link, x) for link in every) and (
            channels_fit(links, x) if shortcut is None else branches_fit(links, shortcut, x)
        )
    if not takes:
        return None
    if known is None:
        known = _make(every, len(links), context, x)
    known.shapes.add(x.shape)
    return known if known.fits else None


def _can_fold(link: Link, x: Tensor) -> bool:
    """Whether the link takes an input like ``x``, but for its channels, as one call."""
    return is_standard(link) and not link.uses_batch and _takes(link, x)


def _takes(link: Link, x: Tensor) -> bool:
    """:func:`_can_fold` of a link that is standard and uses no batch."""
    conv, bn = link
    return (
        bn.weight.device == x.device
        and ops.has_conv_relu_kernel(x, conv.weight, conv.groups, conv.stride[0])
        and x.dtype == computed_dtype(link, x)
    )


def _known(every: Sequence[Link], context: tuple[Any, ...], x: Tensor) -> Folds | None:
    """What is remembered, if it is of these links and they are as they were."""
    # A captured graph computes its folds each time it is replayed: it is told of no change, and
    # what it is given must not be freed.
    if type(every[0].conv) is not nn.Conv2d or _is_captured(x):
        return None
    known = _folds.get(every[0].conv)
    if known is None or known.context != context:
        return None
    for link, source in zip(every, known.sources, strict=True):
        # Any of the convolutions may have been told to forget, or be part of something else by now.
        if not source.is_still(link) or _folds.get(link.conv) is not known:
            return None
    return known


def _make(every: Sequence[Link], count: int, context: tuple[Any, ...], x: Tensor) -> Folds:
    """The folds of ``count`` links and the shortcut behind them, remembered where they may be."""
    scales, biases = map(list, zip(*map(_scale_and_bias, every), strict=True))
    if len(every) > count:
        biases[count - 1] = biases[count - 1] + biases[count]
        biases[count] = None
    made = [_fold(*parts, x) for parts in zip(every, scales, biases, strict=True)]
    fits = x.dtype != torch.float16 or all(map(_is_finite, made))
    tensors = [tensor for link in every for tensor in _tensors(link)]
    keeps = not _is_captured(x) and not any(t is not None and t.is_inference() for t in tensors)
    sources = [Source.of(link) for link in every] if keeps else []
    folds = Folds(made[:count], made[count:], fits, sources, context, set())
    if keeps:
        for link in every:
            _folds[link.conv] = folds
    return folds


def _fold(link: Link, scale: Tensor, bias: Tensor | None, x: Tensor) -> Fold:
    weight = ops.PackedWeight(link.conv.weight.detach(), scale)
    if not _is_ours(link, x):
        weight = weight.scaled().to(dtype=x.dtype, memory_format=torch.channels_last)
        bias = None if bias is None else bias.to(x.dtype)
    return Fold(weight, bias, link.geometry)


def _is_finite(fold: Fold) -> bool:
    tensors = (t for t in (fold.weight, fold.bias) if isinstance(t, Tensor))
    return all(bool(t.isfinite().all()) for t in tensors)


def _is_ours(link: Link, x: Tensor) -> bool:
    """Whether the convolution is our own, which takes float32 weights and biases in any dtype."""
    conv = link.conv
    return ops.has_conv_kernel(x, conv.weight, conv.groups, conv.stride[0])


def _settings(link: Link) -> tuple[Any, ...]:
    """What a link computes with beside its tensors."""
    conv, bn = link
    # The attributes are counted because one more could stand in front of a parameter.
    return _conv_settings(conv), _bn_settings(bn), len(vars(conv)), len(vars(bn))


def _tensors(link: Link) -> tuple[Tensor | None, ...]:
    bn = link.bn
    # num_batches_tracked because torch's training moves the others without a new version.
    return (*link.parameters, bn.running_mean, bn.running_var, bn.num_batches_tracked)


def _registered(link: Link) -> tuple[Tensor | None, ...]:
    """:func:`_tensors` without ``nn.Module``'s attributes, which take ten times as long; None for
    one that is not registered, but a plain attribute."""
    conv, bn, statistics = link.conv._parameters, link.bn._parameters, link.bn._buffers
    return (
        conv.get("weight"),
        conv.get("bias"),
        bn.get("weight"),
        bn.get("bias"),
        statistics.get("running_mean"),
        statistics.get("running_var"),
        statistics.get("num_batches_tracked"),
    )


def _scale_and_bias(link: Link) -> tuple[Tensor, Tensor]:
    """What a batch norm makes of its convolution: a factor for each output channel's weights, and
    the bias; float32 [K]."""
    conv, bn = link
    scale = bn.weight.float() * (bn.running_var.float() + bn.eps).rsqrt()
    bias = bn.bias.float() - bn.running_mean.float() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.float() * scale
    return scale, bias


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
