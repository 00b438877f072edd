# SPDX-License-Identifier: Apache-2.0
"""Every example, on the small form of its stand-in, as ``--quick`` runs it; and the stand-ins."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import STAND_INS, stand_in

from fastresnet import models
from fastresnet.data import DatasetError, load_image_folder, open_dataset
from fastresnet.data.datasets.registry import UNFINISHED

EXAMPLES = Path(importlib.util.find_spec("stand_ins").origin).parent
TESTED_BY_NAME = {
    "butterflies",
    "cifar10",
    "fine_tune",
    "mnist_m",
    "retinopathy",
    "retinopathy_lab3",
    "several_processes",
    "swap_torchvision",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the examples run in: stand-ins are written there once."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(autouse=True)
def _in_the_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(workplace)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name: str, *arguments: str) -> None:
    importlib.import_module(name).main([*arguments, "--quick"])


def test_no_example_is_forgotten() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED_BY_NAME | {"stand_ins"}


@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [
        ("retinopathy", 5, {"train": 105, "test": 27}),
        ("butterflies", 10, {"train": 120, "validation": 20, "test": 20}),
        ("mnist-m", 10, {"train": 400, "test": 200}),
        ("cifar10", 10, {"train": 200, "test": 50}),
    ],
)
def test_stand_ins_are_recognised(name: str, classes: int, sizes: dict[str, int]) -> None:
    assert name in STAND_INS
    folder = stand_in(name, small=True)
    dataset = open_dataset(folder)
    assert len(dataset.classes) == classes
    found = {part: len(images) for part, images in dataset.parts.items()}
    assert found.keys() == sizes.keys()
    assert all(abs(found[part] - size) <= 2 for part, size in sizes.items()), found
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert stand_in(name, small=True) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_no_patient_of_the_stand_in_is_in_both_parts_and_grades_are_those_of_the_package() -> None:
    folder = stand_in("retinopathy", small=True)
    dataset = open_dataset(folder)
    train, test = (set(part.groups.tolist()) for part in (dataset.train, dataset.test))
    assert not train & test
    counts = torch.bincount(torch.cat([dataset.train.labels, dataset.test.labels]), minlength=5)
    assert counts[4] == 0
    assert counts[:4].min() > 0
    # Every grade is in the test part, about in proportion.
    shares = torch.bincount(dataset.test.labels, minlength=5)[[0, 3]] / counts[[0, 3]]
    assert (shares - 0.2).abs().max() < 0.1


def test_an_interrupted_stand_in_is_written_again(tmp_path: Path) -> None:
    (tmp_path / UNFINISHED).touch()
    with pytest.raises(DatasetError, match="whose writing was interrupted"):
        open_dataset(tmp_path)
    stand_in("butterflies", tmp_path, small=True)
    assert not (tmp_path / UNFINISHED).exists()
    assert len(load_image_folder(tmp_path).train) == 120


def test_retinopathy(capsys: pytest.CaptureFixture[str]) -> None:
    run("retinopathy", "--output", "a")
    printed = capsys.readouterr().out
    assert re.search(r"^quadratic weighted kappa (-?\d\.\d{4}|undefined); accuracy", printed, re.M)
    assert "recall of proliferative DR: no images" in printed
    assert "report.html" in {path.name for path in Path("a").iterdir()}
    run("retinopathy", "--output", "a")  # goes on: nothing is left to train
    again = capsys.readouterr().out
    assert "epoch 1/1" in printed
    assert "epoch 1/1" not in again
    assert printed.splitlines()[-6:] == again.splitlines()[-6:]


def test_retinopathy_as_a_regression_from_a_file_of_weights() -> None:
    torch.manual_seed(1)
    torch.save(models.resnet18().state_dict(), "weights.pt")
    recipe = ("--recipe", "retinopathy-kappa", "--set", "model.name=resnet18")
    run("retinopathy", *recipe, "--pretrained", "weights.pt", "--output", "kappa")
    config = json.loads(Path("kappa", "config.json").read_text())
    assert (config["model"]["pretrained"], config["loss"]["kind"]) == ("weights.pt", "regression")


def test_retinopathy_lab3() -> None:
    run("retinopathy_lab3", "--output", "b")
    sizes = [
        json.loads(Path("b", name, "config.json").read_text())["augment"]["size"]
        for name in ("64px", "32px")
    ]
    assert sizes == [64, 32]
    assert "augment.size" in Path("b", "compare.html").read_text()


def test_butterflies(capsys: pytest.CaptureFixture[str]) -> None:
    run("butterflies", "--networks", "resnet50", "--output", "c")
    assert re.search(r"^resnet50: \d+\.\d\d% of the test images$", capsys.readouterr().out, re.M)
    assert Path("c", "compare.html").is_file()


@pytest.mark.slow
def test_butterflies_with_both_networks() -> None:
    run("butterflies", "--output", "both")  # the weights of the VGG19 are 560 MB
    assert "vgg19" in Path("both", "compare.html").read_text()


def test_mnist_m(capsys: pytest.CaptureFixture[str]) -> None:
    run("mnist_m", "--output", "d")
    printed = capsys.readouterr().out
    assert re.search(r"^validation \d+\.\d\d% of 86, test \d+\.\d\d%$", printed, re.M)
    assert len(re.findall(r"^  \d taken for \d: \d+\.\d{3}%$", printed, re.M)) == 5
    files = {path.name for path in Path("d").iterdir()}
    assert {"best.safetensors", "confusion.csv", "confusion.png", "curves.png"} <= files
    cells = np.loadtxt(
        Path("d", "confusion.csv"), delimiter=",", skiprows=1, usecols=range(1, 11), dtype=int
    )
    assert cells.sum() == 86


def test_cifar10(capsys: pytest.CaptureFixture[str]) -> None:
    run("cifar10", "--output", "e")
    printed = capsys.readouterr().out
    totals = re.findall(r"^total +([\d,]+) +[\d,]+ +([\d,]+)$", printed, re.M)
    assert totals[0] == ("60,554", "5,840,896")  # as the laboratory's slide has them
    assert len(totals) == 2
    for task in ("task1", "task2"):
        assert {"best.safetensors", "curves.png", "confusion.png", "report.html"} <= {
            path.name for path in Path("e", task).iterdir()
        }


def test_swap_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    run("swap_torchvision")
    assert re.search(r"^epoch 1/1  train loss \d\.\d{4}", capsys.readouterr().out, re.M)
    # The line that it says is the only one to change.
    source = (EXAMPLES / "swap_torchvision.py").read_text()
    assert len(re.findall("^.*fastresnet.*import.*$", source, re.M)) == 1


def test_fine_tune(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(2)
    before = models.resnet18()
    torch.save(before.state_dict(), "pretrained.pt")
    run("fine_tune", "--weights", "pretrained.pt", "--epochs", "1", "0", "--output", "head.pt")
    printed = capsys.readouterr().out
    assert "not loaded from pretrained.pt: fc.weight, fc.bias" in printed
    assert re.search(r"^last layer, epoch 1: train loss \d\.\d{4}  test acc", printed, re.M)
    assert re.search(r"^everything, epoch 1: train loss \d\.\d{4}  test acc", printed, re.M)
    assert torch.load("head.pt", weights_only=True)["fc.weight"].shape == (10, 512)


def test_several_processes() -> None:
    stand_in("cifar10", small=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "several_processes.py"), "--quick", "--output", "processes"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^2 processes: \d+\.\d\d% of", done.stdout, re.M)) == 1
    assert len(re.findall(r"^epoch 1/1  lr", done.stdout, re.M)) == 1
    assert json.loads(Path("processes", "summary.json").read_text())["processes"] == 2
