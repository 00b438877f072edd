# SPDX-License-Identifier: Apache-2.0
"""Layers, parameters and operations of networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from test_models import assert_same_state
from torch import nn

from fastresnet import models
from fastresnet.models import build_model, summarize

# Parameters and FLOPs as thop 0.1.1.post2209072238 printed them for the reverted models.
THOP = {
    "simple_cnn": ((3, 32, 32), {}, 60_554, 5_840_896),
    "cifar_resnet18": ((3, 32, 32), {}, 11_173_962, 557_889_024),
    "resnet18_truncated": ((3, 64, 64), {}, 692_106, 81_642_496),
    "resnet18": ((3, 512, 512), {"num_classes": 5}, 11_179_077, 9_526_971_392),
    "resnet50": ((3, 224, 224), {}, 25_557_032, 4_133_742_592),
    "resnet50_projection": ((3, 224, 224), {}, 38_936_676, 6_381_508_608),
    "resnext50_32x4d": ((3, 224, 224), {}, 25_028_904, 4_288_184_320),
    "vgg11_bn": ((3, 224, 224), {}, 132_868_840, 7_638_844_416),
    "vgg19_bn": ((3, 224, 224), {"num_classes": 100}, 139_990_948, 19_687_834_624),
}


@pytest.mark.parametrize("name", THOP)
def test_as_thop_counts(name: str) -> None:
    shape, options, parameters, flops = THOP[name]
    with torch.device("meta"):
        model = build_model(name, **options)
    summary = summarize(model, shape)
    assert (summary.parameters, summary.thop_flops) == (parameters, flops)
    assert sum(layer.parameters for layer in summary.layers) == parameters
    assert sum(layer.multiply_adds for layer in summary.layers) == summary.multiply_adds


def test_as_thop_counts_lab3() -> None:
    with torch.device("meta"):
        model = models.lab3_head(models.resnet18(), 512, 5)
    summary = summarize(model, (3, 512, 512))
    assert (summary.parameters, summary.thop_flops) == (11_432_517, 9_527_144_448)


def test_layers_of_a_fused_block() -> None:
    model = models.convert(torchvision.models.resnet18())
    layers = {layer.name: layer for layer in summarize(model, (3, 64, 64)).layers}
    assert {"layer2.0.conv1", "layer2.0.bn2", "layer2.0.downsample.0"} <= set(layers)
    conv = layers["layer2.0.conv1"]
    assert (conv.type, conv.output_shape) == ("Conv2d", (128, 8, 8))
    assert conv.parameters == 128 * 64 * 9
    assert conv.multiply_adds == conv.thop_flops == 128 * 64 * 9 * 8 * 8
    bn = layers["layer2.0.bn1"]
    assert (bn.parameters, bn.multiply_adds, bn.thop_flops) == (256, 0, 4 * 128 * 8 * 8)
    assert layers["maxpool"].output_shape == (64, 16, 16)
    assert layers["fc"].output_shape == (1000,)


def test_multiply_adds_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, (3, 1), stride=2, padding=(1, 0), groups=2),
        nn.BatchNorm2d(8, affine=False),
        nn.AvgPool2d(2, stride=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5, bias=False),
    )
    layers = summarize(model, (4, 10, 14)).layers
    assert [layer.output_shape for layer in layers] == [
        *((8, 5, 7), (8, 5, 7), (8, 4, 6), (8, 2, 2), (32,), (5,))
    ]
    assert [layer.multiply_adds for layer in layers] == [8 * 5 * 7 * 2 * 3, 0, 0, 0, 0, 160]
    extra = [layer.thop_flops - layer.multiply_adds for layer in layers]
    assert extra == [0, 2 * 8 * 5 * 7, 8 * 4 * 6, (2 * 3 + 1) * 32, 0, 0]


def test_shared_parameters_count_once() -> None:
    linear = nn.Linear(3, 3)
    summary = summarize(nn.Sequential(nn.Flatten(), linear, nn.ReLU(), linear), (3, 1, 1))
    assert [layer.parameters for layer in summary.layers] == [0, 12, 0, 0]
    assert (summary.parameters, summary.multiply_adds) == (12, 18)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_model_is_left_as_it_was(dtype: torch.dtype) -> None:
    model = models.simple_cnn().to(dtype).train()
    before = copy.deepcopy(model)
    summarize(model, (3, 32, 32))
    assert_same_state(model, before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())


def test_table() -> None:
    lines = str(summarize(models.simple_cnn(), (3, 32, 32))).splitlines()
    assert lines[0].split() == [
        *("layer", "type", "output", "parameters", "multiply-adds"),
        "FLOPs",
        "(thop)",
    ]
    assert lines[2].split() == ["features.0", "Conv2d", "32x32x32", "896", "884,736", "884,736"]
    assert lines[-1].split() == ["total", "60,554", "5,644,288", "5,840,896"]
    assert len({len(line) for line in lines}) == 1


def test_images_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"an image that Sequential takes, got 3x64x64: "):
        summarize(models.simple_cnn(), (3, 64, 64))
