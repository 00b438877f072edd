# SPDX-License-Identifier: Apache-2.0
"""Several of :func:`fastresnet.ops.conv_relu` as one call, for inference: what is between two of
them takes as long as a small convolution where Python does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _extension
from .conv import empty_output
from .conv_relu import PackedWeight, launch_conv_relu
from .reference import ConvStep

_MOST_SHAPES = 64


class ConvSequence:
    """Convolutions that read one another's outputs; called with the first one's input, it returns
    the last one's output.

    Each of them takes its input as :func:`fastresnet.ops.launch_conv_relu` does.
    """

    def __init__(self, steps: Sequence[ConvStep]) -> None:
        self.steps = tuple(steps)
        self._last_readers: dict[int, int] = {}
        for index, step in enumerate(self.steps):
            self._last_readers |= dict.fromkeys(_read_by(step), index)
        # By all that they depend on.
        self._arguments: dict[tuple, _Arguments] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not all(isinstance(step.weight, PackedWeight) for step in self.steps):
            return self._one_by_one(x)
        key = (x.shape, x.dtype, torch.get_num_threads())
        arguments = self._arguments.get(key)
        if arguments is not None:
            return torch.ops.fastresnet.conv_relu_sequence.default(x, *arguments)
        arguments = _Arguments([], [], [])
        y = self._one_by_one(x, arguments.add)
        if len(self._arguments) == _MOST_SHAPES:
            self._arguments.clear()
        self._arguments[key] = arguments
        return y

    def _one_by_one(
        self, x: Tensor, see: Callable[[ConvStep, Tensor], None] = lambda *_: None
    ) -> Tensor:
        """Calls ``see`` with each step and what it reads."""
        outputs: list[Tensor | None] = [x]
        for index, step in enumerate(self.steps):
            source = outputs[step.source]
            residual = None if step.residual is None else outputs[step.residual]
            see(step, source)
            operands = source, step.weight, step.bias, residual
            outputs.append(launch_conv_relu(*operands, relu=step.relu, **step.geometry))
            del source, residual, operands
            for read in _read_by(step):
                if self._last_readers[read] == index:
                    outputs[read] = None
        return outputs[-1]


class _Arguments(NamedTuple):
    """What the operator takes beside an input."""

    packed: list[Tensor]
    biases: list[Tensor | None]
    encoded: list[int]

    def add(self, step: ConvStep, source: Tensor) -> None:
        geometry = step.geometry.values()
        self.packed.append(step.weight.for_input(source, *geometry))
        self.biases.append(None if step.bias is None else step.bias.float())
        residual = -1 if step.residual is None else step.residual
        size = step.weight.weight.shape
        self.encoded.extend((step.source, residual, int(step.relu), *size, *geometry))


def _read_by(step: ConvStep) -> list[int]:
    return [read for read in (step.source, step.residual) if read is not None]


if _extension.has_schemas:

    @torch.library.register_fake("fastresnet::conv_relu_sequence")
    def _(x, packed, bias, steps):
        outputs, length = [x], len(steps) // len(packed)
        for first in range(0, len(steps), length):
            source, _, _, *size, stride, padding, dilation, _ = steps[first : first + length]
            outputs.append(empty_output(outputs[source], size, stride, padding, dilation))
        return outputs[-1]
