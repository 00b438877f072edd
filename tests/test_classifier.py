# SPDX-License-Identifier: Apache-2.0
"""Layers behind the convolutions, whose weights inference under autocast casts once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from layouts import channels_last
from own_convolutions import needs_ours
from tolerances import assert_no_worse
from torch import Tensor, nn

import fastresnet
from fastresnet.nn.classifier import classify


def operators(classifier: nn.Module, x: Tensor) -> tuple[Tensor, set[str]]:
    """The output under autocast, and what computed it."""
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        torch.profiler.profile() as profile,
    ):
        y = classify(classifier, x)
    return y, {event.key for event in profile.key_averages()}


def vgg_head(width: int, classes: int) -> nn.Sequential:
    hidden = [nn.Linear(width, 64), nn.ReLU(True), nn.Dropout()]
    return nn.Sequential(*hidden, nn.Linear(64, classes)).eval()


@needs_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize("make", [nn.Linear, vgg_head], ids=["linear", "sequential"])
def test_no_worse_than_torchs(make: Callable[..., nn.Module], rows: int, dtype) -> None:
    exact, found, torchs = [], [], []
    for _ in range(4):
        classifier = make(200, 30)
        x = torch.randn(rows, 200).to(dtype)
        y, names = operators(classifier, x)
        assert "fastresnet::conv_relu" in names
        assert not {"aten::linear", "aten::addmm"} & names
        found.append(y)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torchs.append(classifier(x))
        exact.append(copy.deepcopy(classifier).double()(x.double()))
        assert found[-1].dtype == torchs[-1].dtype == torch.bfloat16
        assert found[-1].shape == torchs[-1].shape
    expected = torch.stack(exact)
    scale = expected.abs().max().item()
    assert_no_worse(torch.stack(found), torch.stack(torchs), expected, "logits", scale)


@needs_ours
@pytest.mark.parametrize("change", ["in place", "data", "parameter", "bias", "hook", "step"])
def test_weights_are_cast_until_something_changes(change: str) -> None:
    linear, x = nn.Linear(64, 40), torch.randn(3, 64)
    before, _ = operators(linear, x)
    again, names = operators(linear, x)
    assert torch.equal(before, again)
    assert "fastresnet::conv_pack" not in names, "cast anew"

    def step() -> None:
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.5, fused=True)
        for parameter in linear.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    with torch.no_grad():
        {
            "in place": lambda: linear.weight.mul_(2),
            "data": lambda: setattr(linear.weight, "data", linear.weight.data * 2),
            "parameter": lambda: setattr(linear, "weight", nn.Parameter(linear.weight * 2)),
            "bias": lambda: setattr(linear, "bias", nn.Parameter(torch.ones(40))),
            "hook": lambda: linear.register_forward_hook(lambda _module, _args, y: 2 * y),
            "step": step,
        }[change]()
        found, _ = operators(linear, x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(found, linear(x), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(found, before, atol=0.1)


@pytest.mark.parametrize("architecture", ["resnet18", "vgg11_bn"])
def test_a_network_notices_at_the_next_eval(architecture: str) -> None:
    model = getattr(fastresnet, architecture)(num_classes=10).eval()
    x = channels_last(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        for parameter in model.parameters():
            if parameter.shape[0] == 10:
                parameter.data.mul_(2)
        model.eval()
        torch.testing.assert_close(model(x), 2 * before)


def test_what_is_not_cast_is_torchs() -> None:
    linear, x = nn.Linear(64, 40), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert classify(linear, x).requires_grad
    with torch.no_grad():
        assert torch.equal(classify(linear, x), linear(x))
        half = copy.deepcopy(linear).bfloat16()
        _, names = operators(half, x)
        assert "aten::addmm" in names
    images = torch.randn(2, 5, 64)
    y, names = operators(linear, images)
    assert y.shape == (2, 5, 40)
    assert "aten::linear" in names
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        operators(linear, torch.randn(3, 63))
