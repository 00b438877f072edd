# SPDX-License-Identifier: Apache-2.0
"""Convolution, batch norm and ReLU, one behind another, as one node: against float64, with torch's
own error as the yardstick."""

from __future__ import annotations

import copy

import pytest
import torch
from test_conv import channels_last, nodes, step
from tolerances import assert_no_worse
from torch import nn

import fastresnet
from fastresnet.nn import FusedSequential
from fastresnet.nn.chain import _Chain


def triple(channels: int, out_channels: int, *, bias: bool, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=bias)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


CHAINS = {
    "one": lambda: triple(32, 48, bias=False),
    "two_and_pool": lambda: [
        *triple(32, 32, bias=True),
        *triple(32, 64, bias=True),
        nn.MaxPool2d(2, 2),
    ],
    "strided_and_overlapping_pool": lambda: [
        *triple(16, 40, bias=True, stride=2),
        nn.MaxPool2d(3, 2, 1),
    ],
    "pool_of_another_kind": lambda: [*triple(32, 32, bias=True), nn.MaxPool2d(2, ceil_mode=True)],
    "two_chains": lambda: [
        *triple(32, 32, bias=False),
        nn.MaxPool2d(2),
        *triple(32, 32, bias=True),
        nn.AvgPool2d(2),
    ],
}


pytestmark = pytest.mark.usefixtures("convolutions_at_every_level")


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_against_float64(make, dtype, training, monkeypatch):
    theirs = nn.Sequential(*make()).to(memory_format=torch.channels_last).train(training)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 0.3)
            nn.init.constant_(module.bias, 1.0)  # away from the kink of the ReLU
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.5, 0.5)
    ours = FusedSequential(*copy.deepcopy(theirs))
    exact = copy.deepcopy(theirs).double()
    calls = []
    apply = _Chain.apply
    monkeypatch.setattr(_Chain, "apply", lambda *a: calls.append(1) or apply(*a), raising=True)

    x = channels_last(4, theirs[0].in_channels, 12, 10, dtype=dtype)
    shape = copy.deepcopy(theirs).eval()(x.float()).shape
    grad = torch.randn(shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        torchs, got = step(theirs, x, grad), step(ours, x, grad)
    assert len(calls) == sum(isinstance(module, nn.Conv2d) for module in theirs) - (
        make is CHAINS["two_and_pool"]
    )
    for name, value in step(exact, x.double(), grad.double()).items():
        assert got[name].dtype == torchs[name].dtype, name
        scale = value.abs().max().item()
        if training and name.endswith("bias") and scale < 1e-9:
            # A bias in front of a batch norm that uses the batch: no gradient but rounding.
            assert not got[name].any(), name
            continue
        assert_no_worse(got[name], torchs[name], value, name, scale)


def test_vgg_is_made_of_chains():
    model = fastresnet.vgg11_bn(num_classes=3).to(memory_format=torch.channels_last)
    out = model.features(channels_last(2, 3, 32, 32, dtype=torch.float32))
    names = nodes(out)
    assert names.count("_ChainBackward") == 5
    assert not any("MaxPool2D" in name for name in names)
    assert model.features[1].num_batches_tracked == model.features[-3].num_batches_tracked == 1
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.features.parameters())


def test_what_is_not_plain_runs_as_before():
    chain = FusedSequential(*triple(32, 32, bias=False)).to(memory_format=torch.channels_last)
    x = channels_last(2, 32, 8, 8, dtype=torch.float32).requires_grad_()
    assert "_ChainBackward" in nodes(chain(x))
    seen = []
    handle = chain[1].register_forward_hook(lambda *_: seen.append(1))
    assert "_ChainBackward" not in nodes(chain(x))
    assert seen == [1]
    handle.remove()
    with torch.no_grad():
        assert chain(x).grad_fn is None
    narrow = FusedSequential(*triple(8, 32, bias=False)).to(memory_format=torch.channels_last)
    few = channels_last(2, 8, 8, 8, dtype=torch.float32).requires_grad_()
    assert "_ChainBackward" not in nodes(narrow(few))


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_the_mode_is_that_of_the_forward(training: bool) -> None:
    """As where somebody validates between the forward and its backward."""
    theirs = nn.Sequential(*triple(32, 32, bias=True), *triple(32, 32, bias=True))
    theirs = theirs.to(memory_format=torch.channels_last)
    ours = FusedSequential(*copy.deepcopy(theirs))
    x, found = channels_last(2, 32, 8, 8, dtype=torch.float32), []
    for model in (ours, theirs):
        out = model.train(training)(x)
        model.train(not training)
        out.square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-2)
