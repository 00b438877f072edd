# SPDX-License-Identifier: Apache-2.0
"""The layers of a network with their output shapes, parameters and operations.

Operations are counted in two ways, of which both are in use:

- multiply-adds of convolutions and matrix products, half of what
  :class:`torch.utils.flop_counter.FlopCounterMode` calls FLOPs;
- what the package thop 0.1.1 calls FLOPs: a multiply-add is one, a batch norm costs 4 a value (2
  without weight and bias), an average pool 1 a value of its output, an adaptive one 1 more than
  its window has values; biases, ReLUs, GELUs, max-pools and dropout cost nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["LayerSummary", "ModelSummary", "summarize"]


@dataclass(frozen=True)
class LayerSummary:
    """One call of one module."""

    name: str
    type: str
    output_shape: tuple[int, ...]  # of one image; () where the output is not a tensor
    parameters: int  # 0 where an earlier layer has the same ones
    multiply_adds: int  # of one image
    thop_flops: int  # of one image


@dataclass(frozen=True)
class ModelSummary:
    """A network at one input shape; ``str()`` of it is a table."""

    layers: tuple[LayerSummary, ...]  # in the order in which they run
    parameters: int
    multiply_adds: int  # of one image
    thop_flops: int  # of one image

    def __str__(self) -> str:
        header = ("layer", "type", "output", "parameters", "multiply-adds", "FLOPs (thop)")
        rows = [
            (layer.name, layer.type, "x".join(map(str, layer.output_shape)), *_counts(layer))
            for layer in self.layers
        ]
        rows = [header, *rows, ("total", "", "", *_counts(self))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                f"{cell:<{width}}" if column < 3 else f"{cell:>{width}}"
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def summarize(model: nn.Module, input_shape: Sequence[int]) -> ModelSummary:
    """Runs ``model`` on one image without computing anything, and says what it is made of.

    Layers are the modules without children, also those that a fused block runs as one. The run is
    on the meta device in evaluation mode, on a copy that shares nothing but the structure.

    Args:
        model: any module.
        input_shape: of one image: (channels, height, width).

    Raises:
        ValueError: the model does not take such an image.
    """
    twin = _meta_copy(model).eval()
    dtype = next((p.dtype for p in twin.parameters()), torch.get_default_dtype())
    layers: list[LayerSummary] = []
    counted: set[int] = set()
    before: list[int] = []

    with torch.no_grad(), FlopCounterMode(display=False) as flops:

        def begin(_module: nn.Module, _inputs: tuple[Any, ...]) -> None:
            before.append(flops.get_total_flops())

        def end(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            multiply_adds = (flops.get_total_flops() - before.pop()) // 2
            layers.append(
                LayerSummary(
                    name=name,
                    type=type(module).__name__,
                    output_shape=tuple(output.shape[1:]) if isinstance(output, Tensor) else (),
                    parameters=sum(p.numel() for p in module.parameters() if id(p) not in counted),
                    multiply_adds=multiply_adds,
                    thop_flops=multiply_adds + _thop_extra(module, inputs, output),
                )
            )
            counted.update(map(id, module.parameters()))

        for name, module in twin.named_modules():
            if next(module.children(), None) is None:
                module.register_forward_pre_hook(begin)
                module.register_forward_hook(
                    lambda module, inputs, output, name=name: end(name, module, inputs, output)
                )
        try:
            twin(torch.empty(1, *input_shape, dtype=dtype, device="meta"))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"input: expected an image that {type(model).__name__} takes, got "
                f"{'x'.join(map(str, input_shape))}: {error}"
            ) from error
    multiply_adds = flops.get_total_flops() // 2
    return ModelSummary(
        layers=tuple(layers),
        parameters=sum(parameter.numel() for parameter in twin.parameters()),
        multiply_adds=multiply_adds,
        thop_flops=sum(layer.thop_flops for layer in layers),
    )


def _meta_copy(model: nn.Module) -> nn.Module:
    tensors = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    tensors |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, tensors)


def _thop_extra(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    """What thop counts beside multiply-adds."""
    if isinstance(module, _BatchNorm):
        return (4 if module.affine else 2) * inputs[0].numel()
    if isinstance(module, nn.AvgPool2d):
        return output.numel()
    if isinstance(module, nn.AdaptiveAvgPool2d):
        window = math.prod(inputs[0].shape[-2:]) / math.prod(output.shape[-2:])
        return int((window + 1) * output.numel())
    return 0


def _counts(summary: LayerSummary | ModelSummary) -> tuple[str, ...]:
    return tuple(
        f"{count:,}" for count in (summary.parameters, summary.multiply_adds, summary.thop_flops)
    )
