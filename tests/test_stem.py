# SPDX-License-Identifier: Apache-2.0
"""The stem of a network on images: convolution, batch norm, ReLU and pool against float64, with
torch's own error as the yardstick."""

from __future__ import annotations

import copy

import pytest
import torch
from test_conv import channels_last, nodes
from tolerances import assert_no_worse
from torch import Tensor, nn

from fastresnet.nn.stem import run_stem


def imagenet(channels: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return [conv, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]


def cifar(pool: nn.Module | None = None) -> list[nn.Module]:
    conv = nn.Conv2d(3, 48, 3, padding=1)
    return [conv, nn.BatchNorm2d(48), nn.ReLU(), nn.Identity() if pool is None else pool]


STEMS = {
    "imagenet": imagenet,
    "grey": lambda: imagenet(1),
    "cifar": cifar,
    "another_pool": lambda: cifar(nn.AvgPool2d(2)),
}

pytestmark = pytest.mark.usefixtures("convolutions_at_every_level")


def results(modules: list[nn.Module], out: Tensor, grad: Tensor) -> dict[str, Tensor]:
    out.backward(grad.to(out.dtype))
    found = {"out": out}
    for module in modules[:2]:
        found |= {f"{type(module).__name__}.{n}": p.grad for n, p in module.named_parameters()}
        found |= {n: b for n, b in module.named_buffers() if "running" in n}
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", STEMS.values(), ids=STEMS)
def test_against_float64(make, dtype, training):
    theirs = nn.Sequential(*make()).to(memory_format=torch.channels_last).train(training)
    nn.init.uniform_(theirs[1].weight, 0.1, 0.3)
    nn.init.constant_(theirs[1].bias, 1.0)  # away from the kink of the ReLU
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    x = channels_last(3, theirs[0].in_channels, 34, 30, dtype=torch.float32)
    grad = torch.randn(copy.deepcopy(theirs)(x).shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out, source = run_stem(*ours, x)
        torchs = theirs(x)
    assert "_ChainBackward" in nodes(out)
    assert out.dtype == torchs.dtype
    if type(theirs[3]) is nn.Identity:
        assert torch.equal(source.forward()[0], out)
    else:
        assert source is None
    torchs, got = results(list(theirs), torchs, grad), results(list(ours), out, grad)
    for name, value in results(list(exact), exact(x.double()), grad.double()).items():
        scale = value.abs().max().item()
        if training and name == "Conv2d.bias":  # no gradient but rounding
            assert not got[name].any()
            continue
        assert_no_worse(got[name], torchs[name], value, name, scale)


def test_what_runs_as_before():
    x = channels_last(2, 3, 16, 16, dtype=torch.float32)
    images = x.clone(memory_format=torch.preserve_format).requires_grad_()
    stem = imagenet()
    out, _ = run_stem(*stem, images)
    assert "_ChainBackward" not in nodes(out)
    out.sum().backward()
    assert images.grad is not None
    for index in range(4):
        stem, seen = cifar() if index == 3 else imagenet(), []
        stem[index].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        out, source = run_stem(*stem, x)
        assert seen == [1]
        assert source is None
        assert ("_ChainBackward" in nodes(out)) == (index == 3)
    stem[0] = nn.Conv2d(3, 48, 15, padding=7)  # patches larger than are staged
    assert "_ChainBackward" not in nodes(run_stem(*stem, x)[0])
    with torch.no_grad():
        assert run_stem(*imagenet(), x)[0].grad_fn is None


@pytest.mark.parametrize("autocast", [False, True])
def test_images_of_other_dtypes_are_torchs_business(autocast):
    stem = nn.Sequential(*imagenet())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for dtype in (torch.uint8, torch.float64):
            x = torch.ones(2, 3, 16, 16, dtype=dtype)
            with pytest.raises(RuntimeError) as torchs:
                stem(x)
            with pytest.raises(RuntimeError) as ours:
                run_stem(*stem, x)
            assert str(ours.value) == str(torchs.value)
