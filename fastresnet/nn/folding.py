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
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops
from .batch_norm import is_relu, is_transformed
from .links import (
    Link,
    channels_fit,
    computed_dtype,
    fills_blocks,
    is_standard,
    under_autocast,
)
from .windows import square_windows


@dataclass(frozen=True)
class Fold:
    """A convolution's weight and bias with the batch norm behind it in them.

    ``fits`` says that the dtype can hold them.
    """

    weight: Tensor | ops.PackedWeight
    bias: Tensor
    fits: bool
    sources: tuple[tuple[Tensor | None, int, Tensor | None], ...]
    context: tuple[Any, ...]

    def is_of(self, tensors: Sequence[Tensor | None], context: tuple[Any, ...]) -> bool:
        """Whether it was made of these tensors, and they are as they were.

        Each was kept, and a second tensor on its memory, so that neither can be another's by now.
        """
        if self.context != context or len(self.sources) != len(tensors):
            return False
        for tensor, (source, version, alias) in zip(tensors, self.sources, strict=True):
            if tensor is not source:
                return False
            if tensor is not None and (tensor._version != version or not alias.is_set_to(tensor)):
                return False
        return True


_folds: WeakKeyDictionary[nn.Conv2d, Fold] = WeakKeyDictionary()


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
        if any(id(source) in stepped for source, *_ in known.sources):
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
    images, x = x, under_autocast(link, x)
    if not can_fold(link, x) or not channels_fit([link], x):
        return images, 0
    if _is_ours(link, x):
        suits = fills_blocks(link, x, is_input=True)
    else:
        suits = len(modules) == 3 or square_windows(modules[3]) is None
    if not suits:
        return images, 0
    folded = fold(link, None, x)
    if not folded.fits:
        return images, 0
    return ops.launch_conv_relu(x, folded.weight, folded.bias, **link.geometry), 3


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


def can_fold(link: Link, x: Tensor) -> bool:
    """Whether the link takes an input like ``x``, but for its channels, as one call."""
    conv, bn = link
    return (
        is_standard(link)
        and not link.uses_batch
        and bn.weight.device == x.device
        and ops.has_conv_relu_kernel(x, conv.weight, conv.groups, conv.stride[0])
        and x.dtype == computed_dtype(link, x)
    )


def fold(link: Link, projection: Link | None, x: Tensor) -> Fold:
    """The link's fold for inputs like ``x``, its bias with that of ``projection`` added."""
    tensors = _tensors(link) + (() if projection is None else _tensors(projection))
    # On CUDA also the stream: on another one the fold may not be computed yet.
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    context = (x.dtype, link.bn.eps, projection and projection.bn.eps, stream)
    # A captured graph computes its folds each time it is replayed: it is told of no change, and
    # what it is given must not be freed.
    keeps = not _is_captured(x) and not any(t is not None and t.is_inference() for t in tensors)
    if keeps:
        known = _folds.get(link.conv)
        if known is not None and known.is_of(tensors, context):
            return known
    scale, bias = _scale_and_bias(link)
    if projection is not None:
        bias = bias + _scale_and_bias(projection)[1]
    weight = ops.PackedWeight(link.conv.weight.detach(), scale)
    fits = True
    if not _is_ours(link, x):
        weight = weight.scaled().to(dtype=x.dtype, memory_format=torch.channels_last)
        bias = bias.to(x.dtype)
        if x.dtype == torch.float16:
            fits = bool(weight.isfinite().all() & bias.isfinite().all())
    if not keeps:
        return Fold(weight, bias, fits, (), context)
    sources = tuple((t, 0, None) if t is None else (t, t._version, t.detach()) for t in tensors)
    made = _folds[link.conv] = Fold(weight, bias, fits, sources, context)
    return made


def _is_ours(link: Link, x: Tensor) -> bool:
    """Whether the convolution is our own, which takes float32 weights and biases in any dtype."""
    conv = link.conv
    return ops.has_conv_kernel(x, conv.weight, conv.groups, conv.stride[0])


def _tensors(link: Link) -> tuple[Tensor | None, ...]:
    bn = link.bn
    # num_batches_tracked because torch's training moves the others without a new version.
    return (*link.parameters, bn.running_mean, bn.running_var, bn.num_batches_tracked)


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
