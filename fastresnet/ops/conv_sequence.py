# SPDX-License-Identifier: Apache-2.0
"""Several of :func:`fastresnet.ops.conv_relu` as one call, for inference: what is between two of
them takes as long as a small convolution where Python does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _extension
from .conv import empty_output
from .conv_relu import PackedWeight, launch_conv_relu
from .reference import ConvStep

_STEP_INTS = 11  # of a step's encoding; kStepInts of csrc/cpu/conv.cpp
_MOST_SHAPES = 64


class ConvSequence:
    """Convolutions that read one another's outputs; called with the first one's input, it returns
    the last one's output.

    Each of them takes its input as :func:`fastresnet.ops.launch_conv_relu` does.
    """

    def __init__(self, steps: Sequence[ConvStep]) -> None:
        self.steps = tuple(steps)
        # What the operator takes beside an input, by all that it depends on.
        self._arguments: dict[tuple, tuple[list[Tensor], list[Tensor | None], list[int]]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not all(isinstance(step.weight, PackedWeight) for step in self.steps):
            return self._one_by_one(x)[-1]
        key = (x.shape, x.dtype, torch.get_num_threads())
        arguments = self._arguments.get(key)
        if arguments is None:
            outputs = self._one_by_one(x)
            if len(self._arguments) == _MOST_SHAPES:
                self._arguments.clear()
            self._arguments[key] = self._arguments_for(outputs)
            return outputs[-1]
        return torch.ops.fastresnet.conv_relu_sequence.default(x, *arguments)

    def _one_by_one(self, x: Tensor) -> list[Tensor]:
        """The input, and the output of each step."""
        outputs = [x]
        for step in self.steps:
            residual = None if step.residual is None else outputs[step.residual]
            outputs.append(
                launch_conv_relu(
                    *(outputs[step.source], step.weight, step.bias, residual),
                    relu=step.relu,
                    stride=step.stride,
                    padding=step.padding,
                    dilation=step.dilation,
                    groups=step.groups,
                )
            )
        return outputs

    def _arguments_for(
        self, outputs: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None], list[int]]:
        packed, biases, encoded = [], [], []
        for step in self.steps:
            packed.append(step.weight.for_input(outputs[step.source], *step.geometry))
            biases.append(None if step.bias is None else step.bias.float())
            residual = -1 if step.residual is None else step.residual
            size = step.weight.weight.shape
            encoded += [step.source, residual, int(step.relu), *size, *step.geometry]
        return packed, biases, encoded


if _extension.has_schemas:

    @torch.library.register_fake("fastresnet::conv_relu_sequence")
    def _(x, packed, bias, steps):
        outputs = [x]
        for first in range(0, len(steps), _STEP_INTS):
            source, _, _, *size, stride, padding, dilation, _ = steps[first : first + _STEP_INTS]
            outputs.append(empty_output(outputs[source], size, stride, padding, dilation))
        return outputs[-1]
