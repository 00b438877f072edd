# SPDX-License-Identifier: Apache-2.0
"""Batch norm folded into the convolution in front of it, for inference on
:func:`fastresnet.ops.conv_relu`.

A batch norm in evaluation mode multiplies each channel by a number and adds another: the
convolution's weight and bias can do that. The folded ones are made at the first inference and kept
(:mod:`fastresnet.nn.fold_store`); in a graph of torch.compile, which keeps nothing, at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .batch_norm import is_relu, is_transformed
from .fold_store import keep_fold, recall_fold
from .links import (
    Link,
    computed_dtype,
    fills_blocks,
    is_standard,
    is_traced_elsewhere,
    under_autocast,
)
from .windows import square_windows


class Step(NamedTuple):
    """A convolution with the batch norm behind it, as one of several.

    What it reads is counted: 0 is the first one's input, i the output of the ith.
    """

    link: Link
    source: int
    residual: int | None = None
    relu: bool = True


@dataclass(frozen=True, eq=False)
class Folds:
    """What steps were folded to.

    ``fits`` says that the dtype can hold it; ``shapes`` has those of the inputs that the steps were
    found to take.
    """

    sequence: ops.ConvSequence
    fits: bool
    context: tuple[Any, ...]
    shapes: set[torch.Size]


def run_folded(modules: Sequence[nn.Module], x: Any) -> tuple[Any, int]:
    """Runs the convolution, batch norm, ReLU triple that ``modules`` begins with as one call, and a
    max-pool behind it, on the CPU, as another.

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
    windows = square_windows(modules[3]) if len(modules) > 3 else None
    is_ours = _is_ours(link, x)
    suits = fills_blocks(link, x, is_input=True) if is_ours else windows is None
    out = run_steps([Step(link, 0)], x) if suits else None
    if out is None:
        return images, 0
    if windows is None or not is_ours or not ops.has_max_pool_kernel(out, **windows):
        return out, 3
    return _max_pool(out, windows), 4


def _max_pool(x: Tensor, windows: dict[str, int]) -> Tensor:
    """Of what no ReLU changes, by the operator that is made for a batch norm and ReLU in front."""
    zeros = torch.zeros(x.shape[1], device=x.device)
    ones = torch.ones_like(zeros)
    return ops.bn_relu_max_pool(x, zeros, ones, ones, zeros, **windows, eps=0.0, training=False)


def may_fold(x: Any) -> bool:
    """Whether nothing is differentiated, and nothing would look inside."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not is_traced_elsewhere(x)
        and not is_transformed(x)
        and x.dim() == 4
        and not (x.dtype == torch.float16 and _is_captured(x))
    )


def run_steps(steps: Sequence[Step], x: Tensor) -> Tensor | None:
    """The last step's output, or None (and nothing done) where something asks for more than the
    fused convolutions do.

    Args:
        steps: at least one. The bias of a step without ReLU is added where its output is, so that
            it takes no pass of its own.
        x: [N, C, H, W], as :func:`may_fold` takes it.
    """
    if torch.compiler.is_compiling():
        return _run_traced(steps, x)
    structure = tuple(step[1:] for step in steps)
    context = (
        # Other devices have no fused convolutions, and some not even autocast to ask about.
        *(x.dtype, torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")),
        # On another stream the folds may not be computed yet.
        torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,
    )
    modules = [module for step in steps for module in step.link]
    # A captured graph computes its folds each time it is replayed: it is told of no change, and
    # what it is given must not be freed.
    is_captured = _is_captured(x)
    folds = None if is_captured else recall_fold(modules, structure)
    if folds is not None and folds.context != context:
        folds = None  # and those for this context will take their place
    if folds is not None and x.shape in folds.shapes:
        # The settings of torch and the layout of x are the same for all.
        takes = _takes(steps[0].link, x)
    else:
        takes = _can_fold(steps, x)
    if not takes:
        return None
    if folds is None:
        folds = _make(steps, context, x)
        if not is_captured:
            keep_fold(modules, structure, folds)
    folds.shapes.add(x.shape)
    return folds.sequence(x) if folds.fits else None


def _run_traced(steps: Sequence[Step], x: Tensor) -> Tensor | None:
    """:func:`run_steps` in a graph."""
    if not _can_fold(steps, x):
        return None
    outputs = [x]
    for (link, source, residual, relu), scale, bias in zip(steps, *_vectors(steps), strict=True):
        weight = link.conv.weight.float() * scale[:, None, None, None]
        y = ops.launch_conv_relu(
            *(outputs[source], weight.to(x.dtype), bias),
            None if residual is None else outputs[residual],
            relu=relu,
            **link.geometry,
        )
        outputs.append(y)
    return outputs[-1]


def _can_fold(steps: Sequence[Step], x: Tensor) -> bool:
    """Whether each step takes, as one call, what it is to read, which is like ``x`` but for its
    sizes."""
    links = (step.link for step in steps)
    takes = (is_standard(link) and not link.uses_batch and _takes(link, x) for link in links)
    return all(takes) and _fit_together(steps, x)


def _takes(link: Link, x: Tensor) -> bool:
    """Whether a link that is standard and uses no batch takes an input like ``x``, but for its
    channels, as one call."""
    conv, bn = link
    return (
        bn.weight.device == x.device
        and ops.has_conv_relu_kernel(x, conv.weight, stride=conv.stride[0], groups=conv.groups)
        and x.dtype == computed_dtype(link, x)
    )


def _fit_together(steps: Sequence[Step], x: Tensor) -> bool:
    """Whether each step can read, and add, what it is to."""
    shapes = [list(x.shape[1:])]
    for link, source, residual, _ in steps:
        channels, *sizes = shapes[source]
        out = [link.conv.out_channels, *link.output_sizes(sizes)]
        if link.conv.in_channels != channels or (residual is not None and shapes[residual] != out):
            return False
        shapes.append(out)
    return True


def _make(steps: Sequence[Step], context: tuple[Any, ...], x: Tensor) -> Folds:
    folded = [_fold(*parts, x) for parts in zip(steps, *_vectors(steps), strict=True)]
    fits = x.dtype != torch.float16 or all(map(_is_finite, folded))
    return Folds(ops.ConvSequence(folded), fits, context, set())


def _fold(step: Step, scale: Tensor, bias: Tensor | None, x: Tensor) -> ops.ConvStep:
    link, *structure = step
    weight = ops.PackedWeight(link.conv.weight.detach(), scale)
    if not _is_ours(link, x):
        weight = weight.scaled().to(dtype=x.dtype, memory_format=torch.channels_last)
        bias = None if bias is None else bias.to(x.dtype)
    return ops.ConvStep(weight, bias, *structure, **link.geometry)


def _is_finite(step: ops.ConvStep) -> bool:
    tensors = (t for t in (step.weight, step.bias) if isinstance(t, Tensor))
    return all(bool(t.isfinite().all()) for t in tensors)


def _is_ours(link: Link, x: Tensor) -> bool:
    """Whether the convolution is our own, which takes float32 weights and biases in any dtype."""
    conv = link.conv
    return ops.has_conv_kernel(x, conv.weight, stride=conv.stride[0], groups=conv.groups)


def _vectors(steps: Sequence[Step]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The scale and the bias of each step."""
    scales, biases = map(list, zip(*(_scale_and_bias(step.link) for step in steps), strict=True))
    for index, step in enumerate(steps):
        if step.residual and not steps[step.residual - 1].relu:
            biases[index] = biases[index] + biases[step.residual - 1]
            biases[step.residual - 1] = None
    return scales, biases


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
