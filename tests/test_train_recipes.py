# SPDX-License-Identifier: Apache-2.0
"""Recipes on small data in their published layouts: what each promises, and whole runs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastresnet import models
from fastresnet.data import write_retinopathy
from fastresnet.runs import build_loader, open_data, pixels, split, train_recipe
from fastresnet.train import RECIPES, apply_overrides
from fastresnet.train.distributed import World

TINY = [
    "amp=none",
    "timed_steps=0",
    "tensorboard=false",
    "data.workers=1",
    "data.batch_size=8",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_a_network(name: str) -> None:
    assert RECIPES[name]().model.name in models.MODELS


def photographs(count: int, size: int) -> np.ndarray:
    """Coloured noise whose brightness goes up with its number modulo 5."""
    random = np.random.default_rng(0)
    levels = 40 * (np.arange(count) % 5)[:, None, None, None]
    return (random.integers(0, 60, (count, size, size, 3)) + levels).astype(np.uint8)


def test_grades_of_photographs_end_to_end(tmp_path: Path) -> None:
    grades = (np.arange(60) % 5).tolist()
    patients = (np.arange(60) // 2).tolist()
    write_retinopathy(
        photographs(60, 40), grades, patients, tmp_path / "data", test=list(range(48, 60))
    )
    recipe = apply_overrides(
        RECIPES["retinopathy-kappa"](),
        [
            *TINY,
            "augment.size=32",
            "model.name=resnet18_truncated",
            "schedule.epochs=4",
            "data.validation=0.2",
            "ema=0.5",
        ],
    )
    dataset = open_data(recipe, tmp_path / "data")
    parts = split(recipe, dataset)
    assert not set(parts.train.groups.tolist()) & set(parts.validation.groups.tolist())
    console = Console(file=io.StringIO(), width=200)
    result = train_recipe(recipe, dataset, folder=tmp_path / "run", console=console)
    assert "quadratic weighted kappa" in console.file.getvalue()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["thresholds"]) == 4
    assert summary["thresholds"] == result.thresholds.tolist()
    assert summary["test"]["kappa"] == result.evaluation.kappa
    assert summary["test"]["images"] == 12
    assert {"kappa", "auc", "recall", "majority"} <= set(summary["test"])
    with np.load(tmp_path / "run" / "predictions.npz") as found:
        assert found["index"].tolist() == list(range(12))
        assert found["grades"].shape == (12,)
        thresholds = np.array(summary["thresholds"], dtype=np.float32)
        predicted = np.searchsorted(thresholds, found["grades"], side="right")
        assert predicted.tolist() == found["probabilities"].argmax(1).tolist()


def test_folders_with_their_own_validation_part(tmp_path: Path) -> None:
    for part, count in (("train", 30), ("valid", 10), ("test", 10)):
        for index, image in enumerate(photographs(count, 36)):
            folder = tmp_path / "data" / part / f"class {index % 5}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.png")
    overrides = ["augment.size=32", "model.name=resnet18_truncated", "schedule.epochs=1"]
    recipe = apply_overrides(RECIPES["butterflies-vgg19"](), [*TINY, *overrides])
    dataset = open_data(recipe, tmp_path / "data")
    parts = split(recipe, dataset)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [30, 10, 10]
    assert pixels(parts.test, 0).shape == (36, 36, 3)
    console = Console(file=io.StringIO(), width=200)
    train_recipe(recipe, dataset, folder=tmp_path / "run", console=console)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["classes"] == [f"class {index}" for index in range(5)]
    assert "kappa" not in summary["test"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["source"]["revision"]


def test_balanced_training_shows_rare_grades_as_often_as_common_ones(tmp_path: Path) -> None:
    grades = [0] * 48 + [2] * 12 + [3] * 6  # nobody of grades 1 and 4
    write_retinopathy(photographs(66, 24), grades, None, tmp_path)
    recipe = apply_overrides(RECIPES["retinopathy-resnet18"](), [*TINY, "augment.size=16"])
    for balanced in (False, True):
        chosen = apply_overrides(recipe, [f"data.balanced={str(balanced).lower()}"])
        parts = split(chosen, open_data(chosen, tmp_path))
        settings = {"device": torch.device("cpu"), "world": World()}
        train = build_loader(chosen, parts.train, training=True, **settings)
        counts = torch.bincount(torch.cat([labels for _, labels in train]), minlength=5)
        if balanced:
            assert counts[[1, 4]].tolist() == [0, 0]
            assert counts[[0, 2, 3]].max() <= counts[[0, 2, 3]].min() + 8
        else:
            assert counts[0] > 5 * counts[3]
        validation = build_loader(chosen, parts.validation, training=False, **settings)
        shown = torch.cat([labels for _, labels in validation])
        assert torch.equal(shown, parts.validation.labels)
