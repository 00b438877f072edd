# SPDX-License-Identifier: Apache-2.0
"""Weights from torchvision and from files, into a model with another head."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from test_models import assert_same_state
from torch import nn

from fastresnet import models
from fastresnet.models import ResNet18_Weights, WeightsError, load_pretrained


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """torchvision's network, as a file of its weights has it."""
    torch.manual_seed(7)
    return torchvision.models.resnet18()


def save(model: nn.Module, path: Path, form: str) -> Path:
    state = model.state_dict()
    match form:
        case "safetensors":
            save_file(state, path.with_suffix(".safetensors"))
            return path.with_suffix(".safetensors")
        case "checkpoint":
            state = {"epoch": 3, "state_dict": {f"module.{key}": t for key, t in state.items()}}
        case "references":  # what torchvision's own training script writes
            state = {"model": state, "epoch": 3}
        case "old":
            state = {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(state, path)
    return path


@pytest.mark.parametrize("form", ["plain", "safetensors", "checkpoint", "references", "old"])
def test_files(form: str, trained: nn.Module, tmp_path: Path) -> None:
    path = save(trained, tmp_path / "weights.pth", form)
    model = models.resnet18()
    assert load_pretrained(model, path) == ()
    assert_same_state(model, trained)
    assert load_pretrained(models.resnet18(), str(path)) == ()


def test_head_of_other_classes_is_left(trained: nn.Module, tmp_path: Path) -> None:
    path = save(trained, tmp_path / "weights.pth", "plain")
    for model in (
        models.resnet18(num_classes=5),
        models.lab3_head(models.resnet18(), 256, 5),
        # Only one of the two parameters has another shape: both are left.
        models.lab3_head(models.resnet18(), 256, 1000),
    ):
        head = copy.deepcopy(model.fc)
        assert load_pretrained(model, path) == ("fc.weight", "fc.bias")
        assert_same_state(model.fc, head)
        model.fc = copy.deepcopy(trained.fc)
        assert_same_state(model, trained)


def test_torchvisions_enum(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get_state_dict(self, **options):
        asked.append((self, options["check_hash"]))
        return trained.state_dict()

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    member = ResNet18_Weights.IMAGENET1K_V1
    for weights in (member, "ResNet18_Weights.IMAGENET1K_V1", "ResNet18_Weights.DEFAULT"):
        model = models.resnet18(num_classes=5)
        assert load_pretrained(model, weights) == ("fc.weight", "fc.bias")
        assert torch.equal(model.conv1.weight, trained.conv1.weight)
    assert asked == [(member, True)] * 3


def test_no_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_state_dict(self, **options):
        raise OSError("no network")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    with pytest.raises(WeightsError, match=r"to get the weights from https://.*got: no network"):
        load_pretrained(models.resnet18(), "ResNet18_Weights.IMAGENET1K_V1")


def test_weights_of_another_network_change_nothing(trained: nn.Module, tmp_path: Path) -> None:
    path = save(trained, tmp_path / "weights.pth", "plain")
    for model, message in (
        (models.resnet34(num_classes=3), r"missing: layer1\.2\.conv1\.weight, .* and \d+ more$"),
        (models.resnet18_truncated(), r"unexpected: layer3\.0\.conv1\.weight, .* and \d+ more$"),
        (
            models.build_model("resnet18", in_channels=1),
            r"weights\.pth: expected the weights of this ResNet, got keys of another shape: "
            r"conv1\.weight of 64x3x7x7 instead of 64x1x7x7$",
        ),
    ):
        before = copy.deepcopy(model)
        with pytest.raises(WeightsError, match=message):
            load_pretrained(model, path)
        assert_same_state(model, before)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_bad_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.pth").write_bytes(b"\x80\x02 no weights")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 20)
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "numbers.pth")
    for weights, message in (
        ("damaged.pth", r"damaged\.pth: expected a file of tensors, got: "),
        ("damaged.safetensors", r"damaged\.safetensors: expected a file of tensors, got: "),
        ("evil.pth", r"evil\.pth: expected a file of tensors, got: "),
        ("list.pth", r"list\.pth: expected a state_dict of tensors, got list"),
        ("numbers.pth", r"numbers\.pth: .*, got a dictionary of epoch, loss"),
        ("absent.pth", r"a file, or a name such as .*, got 'absent\.pth'"),
        ("ResNet18_Weights.V9", r"a file, or a name such as .*, got 'ResNet18_Weights\.V9'"),
        ("NoNet_Weights.DEFAULT", r"a file, or a name such as .*, got 'NoNet_Weights\.DEFAULT'"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_pretrained(models.simple_cnn(), weights)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18_truncated"])
def test_last_of_several_linear_layers_is_the_head(name: str, tmp_path: Path) -> None:
    trained = models.build_model(name)
    path = save(trained, tmp_path / "weights.pth", "plain")
    model = models.build_model(name, num_classes=3)
    key = {"simple_cnn": "fc", "resnet18_truncated": "fc.3"}[name]
    own = model.get_submodule(key).weight.clone()
    assert load_pretrained(model, path) == (f"{key}.weight", f"{key}.bias")
    model, expected = model.state_dict(), trained.state_dict()
    assert torch.equal(model.pop(f"{key}.weight"), own)
    assert all(torch.equal(model[k], expected[k]) for k in model if not k.startswith(f"{key}."))
