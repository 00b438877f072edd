# SPDX-License-Identifier: Apache-2.0
"""Several convolutions as one call, against their twin."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import channels_last
from own_convolutions import needs_ours
from tolerances import assert_no_worse
from torch import Tensor

from fastresnet import ops
from fastresnet.ops import reference

pytestmark = needs_ours


@st.composite
def sequences(draw: st.DrawFn) -> tuple[tuple[int, ...], list[ops.ConvStep]]:
    """An input's shape and steps that fit together, some without a reader."""
    shapes = [tuple(draw(st.integers(1, most)) for most in (3, 40, 9, 9))]
    steps: list[ops.ConvStep] = []
    for _ in range(draw(st.integers(1, 6))):
        source = draw(st.integers(0, len(steps)))
        n, channels, height, width = shapes[source]
        kernel, stride = draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))
        sizes = [(size - 1) // stride + 1 for size in (height, width)]
        out = (n, draw(st.sampled_from([channels, 8, 33])), *sizes)
        alike = [index for index, shape in enumerate(shapes) if shape == out]
        residual = draw(st.sampled_from([None, *alike]))
        weight = torch.randn(out[1], channels, kernel, kernel) / (channels * kernel**2) ** 0.5
        bias = torch.randn(out[1]) if draw(st.booleans()) else None
        geometry = (stride, kernel // 2, 1, 1)
        steps.append(ops.ConvStep(weight, bias, source, residual, draw(st.booleans()), *geometry))
        shapes.append(out)
    return shapes[0], steps


def packed(steps: list[ops.ConvStep]) -> ops.ConvSequence:
    return ops.ConvSequence(step._replace(weight=ops.PackedWeight(step.weight)) for step in steps)


@settings(max_examples=100)
@given(case=sequences(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@torch.no_grad()
def test_a_sequence_is_its_steps(case: tuple[tuple[int, ...], list[ops.ConvStep]], dtype) -> None:
    shape, steps = case
    rounded = [
        step._replace(
            weight=step.weight.to(dtype).float(),
            bias=None if step.bias is None else step.bias.to(dtype).float(),
        )
        for step in steps
    ]
    sequence = packed(rounded)
    x = channels_last(*shape, dtype=dtype)
    first, second = sequence(x), sequence(x)
    assert torch.equal(first, second), "one by one, then as one"
    doubles = [
        step._replace(
            weight=step.weight.double(), bias=None if step.bias is None else step.bias.double()
        )
        for step in rounded
    ]
    exact = reference.conv_relu_sequence(x.double(), doubles)
    torchs = reference.conv_relu_sequence(x, rounded)
    scale = max(1.0, exact.abs().max().item())
    assert_no_worse(second, torchs, exact, "y", len(steps) * scale)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "other"])
@torch.no_grad()
def test_what_nothing_reads_any_more_is_freed(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    weight = torch.randn(8, 8, 1, 1)
    steps = []
    for index in range(6):
        residual = index - 1 if index % 2 else None
        rest = (None, index, residual, True, 1, 0, 1, 1)
        steps.append(ops.ConvStep(ops.PackedWeight(weight) if ours else weight, *rest))
    made: list[weakref.ref[Tensor]] = []
    alive = 0

    def launch(x, weight, bias, residual, **settings) -> Tensor:
        nonlocal alive
        alive = max(alive, sum(tensor() is not None for tensor in made))
        values = weight.weight if ours else weight
        y = reference.conv_relu(x, values, bias, residual, **settings)
        made.append(weakref.ref(y))
        return y

    monkeypatch.setattr(sys.modules["fastresnet.ops.conv_sequence"], "launch_conv_relu", launch)
    x = channels_last(1, 8, 3, 3)
    expected = reference.conv_relu_sequence(x, [step._replace(weight=weight) for step in steps])
    assert torch.equal(ops.ConvSequence(steps)(x), expected)
    assert len(made) == 6
    assert alive == 2


def two_steps() -> tuple[Tensor, list[Tensor], list[Tensor | None], list[int]]:
    x, sequence = channels_last(2, 8, 6, 6), packed(_two())
    with torch.no_grad():
        sequence(x)
    (arguments,) = sequence._arguments.values()
    return x, *arguments


def _two() -> list[ops.ConvStep]:
    first = ops.ConvStep(torch.randn(16, 8, 3, 3), torch.randn(16), 0, None, True, 2, 1, 1, 1)
    second = ops.ConvStep(torch.randn(16, 16, 1, 1), None, 1, 1, False, 1, 0, 1, 1)
    return [first, second]


@torch.no_grad()
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastresnet.conv_relu_sequence.default, two_steps())


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    run = torch.ops.fastresnet.conv_relu_sequence.default
    x, weights, biases, steps = two_steps()
    for match, arguments in {
        "a weight, a bias and 11 numbers for each step, got 2, 1 and 22": (weights, biases[:1]),
        "got 1, 2 and 22": (weights[:1], biases),
        "got 0, 0 and 0": ([], [], []),
        "step 1 to read what comes before it, got 1 and -1": (weights, biases, [1, *steps[1:]]),
        "step 2 to read what comes before it, got 1 and 2": (
            *(weights, biases),
            [*steps[:12], 2, *steps[13:]],
        ),
        "step 1 to read what comes before it, got -1 and -1": (weights, biases, [-1, *steps[1:]]),
        r"packed weight of \d+ values": (weights[::-1], biases),
    }.items():
        with pytest.raises(ValueError, match=match):
            run(x, *(*arguments, steps)[:3])


@torch.no_grad()
def test_the_arguments_of_many_sizes_are_not_all_kept() -> None:
    sequence = packed(_two())
    for height in range(1, 80):
        x = channels_last(1, 8, height, 3)
        assert torch.equal(sequence(x), sequence(x))
    assert len(sequence._arguments) < 70
