# SPDX-License-Identifier: Apache-2.0
"""Networks by name."""

from __future__ import annotations

import inspect

import pytest
import torch
from test_models import RESNETS, VGGS, assert_same_state
from torch import nn

from fastresnet import models
from fastresnet.models import MODELS, build_model

OTHERS = ["resnet50_projection", "resnet18_truncated", "cifar_resnet18", "simple_cnn"]


def test_every_factory_has_its_name() -> None:
    assert set(MODELS) == {*RESNETS, *VGGS, *OTHERS}
    factories = {
        name
        for name in models.__all__
        if inspect.isfunction(getattr(models, name))
        and name.startswith(("cifar_", "resne", "simple", "vgg", "wide"))
    }
    assert factories == set(MODELS)
    for name, factory in MODELS.items():
        assert factory is getattr(models, name)


@pytest.mark.parametrize("name", MODELS)
def test_classes_and_channels(name: str) -> None:
    size = 32 if name == "simple_cnn" else 64
    with torch.device("meta"):
        for num_classes, in_channels in ((7, 1), (3, 4)):
            model = build_model(name, num_classes=num_classes, in_channels=in_channels).eval()
            out = model(torch.empty(2, in_channels, size, size))
            assert out.shape == (2, num_classes)
        default = build_model(name)
        assert [p.shape for p in default.parameters()] == [
            p.shape for p in MODELS[name]().parameters()
        ]


@pytest.mark.parametrize("name", ["resnet18", "resnet18_truncated", "cifar_resnet18", "simple_cnn"])
def test_it_is_the_factorys_network(name: str) -> None:
    networks = []
    for build in (lambda **options: build_model(name, **options), MODELS[name]):
        torch.manual_seed(3)
        networks.append(build(num_classes=4))
    assert_same_state(*networks)
    assert [type(a) for a in networks[0].modules()] == [type(b) for b in networks[1].modules()]


def test_grey_stems_start_as_torchvisions() -> None:
    """With the spread of He's initialisation by the fan out, which does not depend on channels."""
    for name in ("resnet18", "resnet18_truncated"):
        stem = build_model(name, in_channels=1).conv1
        assert (stem.kernel_size, stem.stride, stem.padding) == ((7, 7), (2, 2), (3, 3))
        assert stem.bias is None
        assert stem.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.1)
    with torch.device("meta"):
        assert build_model("vgg11_bn", in_channels=1).features[0].bias is not None


def test_options_reach_the_factory() -> None:
    assert build_model("simple_cnn", image_size=28, dropout=0.2).dropout.p == 0.2
    assert not build_model("resnet18", zero_init_residual=True).layer1[0].bn2.weight.any()
    with pytest.raises(TypeError, match="depth"):
        build_model("resnet18", depth=3)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected one of resnet18, .*simple_cnn, got 'alexnet'"):
        build_model("alexnet")
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        build_model("resnet18", num_classes=0)
    with pytest.raises(ValueError, match="in_channels: expected at least 1, got -1"):
        build_model("resnet18", in_channels=-1)


def test_pretrained_weights_with_other_classes(tmp_path) -> None:
    trained = build_model("simple_cnn", num_classes=10)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    model = build_model("simple_cnn", num_classes=5, weights=tmp_path / "weights.pth")
    assert torch.equal(model.features[0].weight, trained.features[0].weight)
    assert isinstance(model.fc, nn.Linear)
    assert model.fc.out_features == 5
