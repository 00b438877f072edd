# SPDX-License-Identifier: Apache-2.0
"""The folder of a run, written and read back: whole, in part, and damaged."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import add_events, events, write_run
from torchmetrics.functional.classification import (
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from fastresnet.train.confusion import Confusion, read_confusion, write_confusion
from fastresnet.train.run_directory import (
    Predictions,
    RunError,
    failure,
    is_finished,
    is_resumable,
    read_run,
    write_failure,
    write_json,
)

COUNTS = torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
CLASSES = ("cat", 'dog, "small"', "none")


def test_json_files(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"accuracy": 0.5})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"accuracy": 0.5}
    assert len(list(tmp_path.iterdir())) == 1


def test_confusion_tables(tmp_path: Path) -> None:
    write_confusion(tmp_path, COUNTS, CLASSES)
    with (tmp_path / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == list(CLASSES)
    assert [row[0] for row in rows[1:]] == list(CLASSES)
    assert [[int(value) for value in row[1:]] for row in rows[1:]] == COUNTS.tolist()
    with (tmp_path / "confusion_normalised.csv").open(newline="") as file:
        shares = [[float(value) for value in row[1:]] for row in list(csv.reader(file))[1:]]
    # The class without an image has a row of zeros, not a division by zero.
    assert shares == [[0.8, 0.2, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]

    read = read_confusion(tmp_path / "confusion.csv")
    assert read.classes == CLASSES
    assert read.counts.tolist() == COUNTS.tolist()


def test_confusion_of_hand_computed_counts() -> None:
    confusion = Confusion(COUNTS.numpy(), CLASSES)
    assert confusion.images == 14
    assert confusion.support.tolist() == [10, 4, 0]
    assert confusion.majority == ("cat", pytest.approx(10 / 14))
    np.testing.assert_allclose(confusion.recall, [0.8, 0.75, np.nan])
    np.testing.assert_allclose(confusion.precision, [8 / 9, 0.6, np.nan])
    np.testing.assert_allclose(confusion.f1, [16 / 19, 6 / 9, np.nan])
    assert confusion.mistakes() == [(0, 1, 2), (1, 0, 1)]


def test_confusion_agrees_with_torchmetrics() -> None:
    labels, predicted = torch.randint(5, (2, 400))
    counts = np.zeros((5, 5), dtype=np.int64)
    np.add.at(counts, (labels.numpy(), predicted.numpy()), 1)
    confusion = Confusion(counts, tuple("abcde"))
    for ours, theirs in (
        (confusion.recall, multiclass_recall),
        (confusion.precision, multiclass_precision),
        (confusion.f1, multiclass_f1_score),
    ):
        expected = theirs(predicted, labels, num_classes=5, average="none")
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a column and a row for each class"),
        ("true,a,b\na,1,2\n", "expected a column and a row for each class"),
        ("true,a,b\nb,1,2\na,3,4\n", "expected a column and a row for each class"),
        ("true,a,b\na,1,2\nb,3,x\n", "expected counts"),
        ("true,a,b\na,1,2\nb,3\n", "expected 2 counts of b, got 1"),
    ],
)
def test_a_damaged_confusion_is_named(tmp_path: Path, text: str, message: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "confusion.csv").write_text(text)
    with pytest.raises(RunError, match=message) as error:
        read_run(run)
    assert "confusion.csv" in str(error.value)


def test_a_whole_run_is_read_back(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", name="recipe", lr=0.3, epochs=4, ordinal=True)
    run = read_run(folder)
    assert (run.name, run.title, run.finished, run.failure) == ("one", "recipe", True, None)
    assert run.config["optim"] == {"lr": 0.3}
    assert list(run.epochs) == events(folder, "epoch")
    assert [run.test] == events(folder, "test")
    assert [run.step_timing] == events(folder, "step_timing")
    assert run.best == run.epochs[-1]
    assert run.confusion.counts.trace() / run.confusion.images == run.test["accuracy"]
    assert len(run.predictions.labels) == run.confusion.images


def test_repeated_rows_of_a_resumed_run_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    again = {**events(folder, "epoch")[1], "val_loss": 0.25}
    add_events(folder, again, {"event": "step", "step": 50, "loss": 0.1})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epo')  # killed while it wrote
    epochs = read_run(folder).epochs
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert epochs[1]["val_loss"] == 0.25


@pytest.mark.parametrize(
    ("select", "best"), [("accuracy", 2), ("loss", 3), ("kappa", 1), (None, 2)]
)
def test_the_best_epoch_of_an_unfinished_run(tmp_path: Path, select: str | None, best: int) -> None:
    rows = [(1, 0.6, 0.9, 0.8), (2, 0.7, 0.5, 0.7), (3, 0.65, 0.4, None)]
    keys = ("epoch", "val_accuracy", "val_loss", "val_kappa")
    write_json(tmp_path / "config.json", {"evaluation": {"select": select}} if select else {})
    add_events(tmp_path, *({"event": "epoch", **dict(zip(keys, row, strict=True))} for row in rows))
    run = read_run(tmp_path)
    assert not run.finished
    assert run.best["epoch"] == best


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"name": "recipe"})
    run = read_run(tmp_path)
    assert run.epochs == ()
    assert (run.best, run.test, run.step_timing, run.confusion, run.predictions) == (None,) * 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json: expected JSON"),
        ("summary.json", "[1]", "summary.json: expected a JSON object, got list"),
        ("metrics.jsonl", "no\n{}\n", "metrics.jsonl, line 1: expected JSON"),
        ("metrics.jsonl", '{"epoch": 1}\n', 'line 1: expected an object with "event"'),
        ("predictions.npz", "no archive", "predictions.npz: expected the arrays"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(RunError, match=message):
        read_run(folder)


@pytest.mark.parametrize(
    "arrays",
    [
        {"labels": np.zeros(3, int), "index": np.zeros(3, int)},
        {"probabilities": np.ones((4, 2)), "labels": np.zeros(3, int), "index": np.zeros(3, int)},
        {"probabilities": np.ones(3), "labels": np.zeros(3, int), "index": np.zeros(3, int)},
    ],
)
def test_predictions_of_other_shapes_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    folder = write_run(tmp_path / "run")
    np.savez(folder / "predictions.npz", **arrays)
    with pytest.raises(RunError, match="expected the arrays probabilities"):
        read_run(folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the folder of a run"):
        read_run(tmp_path / "absent")
    with pytest.raises(RunError, match="expected the folder of a run"):
        read_run(tmp_path)


def test_states_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert (is_finished(folder), is_resumable(folder), failure(folder)) == (False, False, None)
    write_failure(folder, FloatingPointError("diverged"))
    write_json(folder / "config.json", {})
    assert (is_finished(folder), is_resumable(folder), failure(folder)) == (False, True, "diverged")
    assert read_run(folder).failure == "diverged"
    write_json(folder / "summary.json", {"dataset": "zoo"})
    assert is_finished(folder)


def test_the_worst_mistakes_come_first() -> None:
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.6, 0.4]], dtype=np.float32)
    labels, index = np.array([0, 0, 0, 1]), np.array([7, 5, 3, 1])
    assert Predictions(probabilities, labels, index).worst(2).tolist() == [2, 1]
    assert Predictions(probabilities, labels, index).worst(9).tolist() == [2, 1, 3]
    # Of a regression it is the grade that says how bad a mistake is.
    grades = np.array([0.1, 1.4, 0.6, -0.4])
    assert Predictions(probabilities, labels, index, grades).worst(9).tolist() == [1, 3, 2]
