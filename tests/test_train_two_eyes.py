# SPDX-License-Identifier: Apache-2.0
"""Both eyes of a patient graded together."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from fastresnet.cli import main
from fastresnet.data import write_retinopathy
from fastresnet.runs import open_data, train_recipe
from fastresnet.train import RECIPES, ConfigError, apply_overrides
from fastresnet.train.metrics import Evaluation
from fastresnet.train.two_eyes import Fusion, fit_fusion, other_eyes

SETTINGS = [
    "augment.size=32",
    "data.batch_size=8",
    "data.validation=0.25",
    "device=cpu",
    "ema=0.5",
    "evaluation.two_eyes=true",
    "model.name=resnet18_truncated",
    "schedule.epochs=2",
    "tensorboard=false",
    "timed_steps=0",
]


def evaluation(grades: Tensor, labels: Tensor) -> Evaluation:
    return Evaluation(0.0, torch.zeros(len(labels), 5), labels, grades)


@given(st.lists(st.integers(0, 6), max_size=12))
def test_the_other_eye_is_the_patients(patients: list[int]) -> None:
    others = other_eyes(torch.tensor(patients, dtype=torch.int64)).tolist()
    for index, other in enumerate(others):
        assert patients[other] == patients[index]
        assert (other != index) == (patients.count(patients[index]) == 2)


def test_weights_that_made_the_labels_are_found() -> None:
    grades = torch.rand(40) * 4
    others = other_eyes(torch.arange(40) // 2)
    labels = 0.7 * grades + 0.2 * grades[others] + 0.1
    fusion = fit_fusion(evaluation(grades, labels), others)
    assert fusion == pytest.approx((0.7, 0.2, 0.1), abs=1e-5)
    fused = fusion.applied(evaluation(grades, labels), others)
    torch.testing.assert_close(fused.grades, labels)


def test_two_noisy_eyes_say_more_than_one() -> None:
    patients = torch.arange(400) // 2
    others = other_eyes(patients)
    labels = torch.randint(0, 5, (200,))[patients]
    grades = labels + torch.randn(400)
    fusion = fit_fusion(evaluation(grades[:200], labels[:200]), others[:200])
    rest = evaluation(grades[200:], labels[200:])
    fused = fusion.applied(rest, others[200:] - 200)
    alone, together = ((e.grades - e.labels).square().mean() for e in (rest, fused))
    assert together < 0.7 * alone  # half the variance, but for what the weights cost


def test_without_pairs_there_is_nothing_to_fuse() -> None:
    alone = evaluation(torch.rand(6), torch.arange(6) % 5)
    with pytest.raises(ConfigError, match="two_eyes: expected validation images of both eyes"):
        fit_fusion(alone, other_eyes(torch.arange(6)))
    with pytest.raises(ValueError, match="expected the other eye of 6 images, got 4"):
        Fusion(1.0, 0.0, 0.0).applied(alone, torch.arange(4))


def photographs(count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    levels = 40 * (np.arange(count) // 2 % 5)[:, None, None, None]
    return (random.integers(0, 60, (count, 40, 40, 3)) + levels).astype(np.uint8)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    patients = np.arange(64) // 2
    write_retinopathy(
        photographs(64),
        (patients % 5).tolist(),
        patients.tolist(),
        tmp_path / "data",
        test=list(range(48, 64)),
    )
    return tmp_path / "data"


def test_a_run_with_both_eyes_and_its_evaluation_agree(data: Path, tmp_path: Path) -> None:
    recipe = apply_overrides(RECIPES["retinopathy-kappa"](), SETTINGS)
    folder, again = tmp_path / "run", tmp_path / "again"
    result = train_recipe(
        recipe, open_data(recipe, data), folder=folder, console=Console(file=io.StringIO())
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["fusion"] == result.fusion._asdict()
    arguments = ["eval", str(folder), "--data", str(data), "--output", str(again)]
    assert main([*arguments, "--part", "test"]) == 0
    alone = tmp_path / "alone"
    arguments[-1] = str(alone)
    assert main([*arguments, "--part", "test", "--set", "evaluation.two_eyes=false"]) == 0
    grades = {
        path: torch.from_numpy(np.load(path / "predictions.npz")["grades"])
        for path in (folder, again, alone)
    }
    assert torch.equal(grades[folder], grades[again])
    own, others = grades[alone], torch.arange(16) ^ 1
    fusion = result.fusion
    expected = fusion.own * own + fusion.other * own[others] + fusion.bias
    torch.testing.assert_close(grades[folder], expected)


def test_an_evaluation_needs_a_run_that_fused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = apply_overrides(
        RECIPES["retinopathy-kappa"](), [*SETTINGS, "evaluation.two_eyes=false"]
    )
    folder = tmp_path / "run"
    console = Console(file=io.StringIO())
    assert train_recipe(recipe, open_data(recipe, data), folder=folder, console=console)
    arguments = ["eval", str(folder), "--data", str(data), "--set", "evaluation.two_eyes=true"]
    assert main(arguments) == 2
    assert "expected a run that was tested with it" in capsys.readouterr().err


def test_pairs_are_missed_before_training(tmp_path: Path) -> None:
    """Not behind the last epoch."""
    grades = (np.arange(60) % 5).tolist()
    alone = list(range(60))  # a patient each
    write_retinopathy(photographs(60), grades, alone, tmp_path / "data", test=alone[48:])
    recipe = apply_overrides(RECIPES["retinopathy-kappa"](), SETTINGS)
    with pytest.raises(ConfigError, match="expected validation images of both eyes"):
        train_recipe(recipe, open_data(recipe, tmp_path / "data"), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.kind=cross-entropy"], "expected a regression on the grade"),
        (["data.layout=image-folder"], "expected a data set that names the patient"),
    ],
)
def test_what_cannot_be_fused_is_told(
    data: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    if "layout" in overrides[0]:
        for part in ("train", "valid", "test"):
            for index in range(5):
                folder = tmp_path / "folders" / part / str(index)
                folder.mkdir(parents=True)
                for source in sorted(data.rglob("*.jpeg"))[:3]:
                    (folder / source.name).write_bytes(source.read_bytes())
        data = tmp_path / "folders"
    recipe = apply_overrides(RECIPES["retinopathy-kappa"](), [*SETTINGS, *overrides])
    with pytest.raises(ConfigError, match=message):
        train_recipe(recipe, open_data(recipe, data), folder=tmp_path / "run")
