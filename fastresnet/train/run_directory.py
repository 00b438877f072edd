# SPDX-License-Identifier: Apache-2.0
"""The files that a run leaves in its folder, and the run as they tell it.

==========================  ===================================================================
``config.json``             the resolved configuration
``environment.json``        versions, machine, build
``metrics.jsonl``           one JSON object a line, its ``event`` being epoch, test, step_timing
``summary.json``            the outcome; written last, so a folder that has it is a finished run
``failed.json``             why the run cannot go on, where that is so
``confusion.csv``           the confusion matrix of the test images, with the classes' names
``predictions.npz``         ``probabilities`` [N, C], ``labels`` [N] and ``index`` [N] of the test
                            images, and the ``grades`` [N] of a regression
==========================  ===================================================================
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastresnet.files import write_atomically
from fastresnet.train.confusion import Confusion, read_confusion

_CONFIG, _SUMMARY, _FAILED = "config.json", "summary.json", "failed.json"


class RunError(ValueError):
    """A folder is not that of a run, or a file in it is damaged."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file that is whole or absent."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


@dataclass(frozen=True)
class Predictions:
    """What the test pass predicted: ``probabilities`` (float32 [N, C]), ``labels`` and ``index``
    (int64 [N]); the last says which image of the test set it was. ``grades`` (float32 [N]) are the
    outputs of a regression, else None."""

    probabilities: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    grades: np.ndarray | None = None

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class (int64 [N])."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """The probability of the most probable class (float32 [N])."""
        return self.probabilities.max(axis=1)

    def worst(self, count: int) -> np.ndarray:
        """Positions (int64) of at most ``count`` mistakes: the most confident first, or those of a
        regression that are furthest from the label."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        if self.grades is None:
            severity = self.confidence[wrong]
        else:
            severity = np.abs(self.grades[wrong] - self.labels[wrong])
        return wrong[np.argsort(-severity, kind="stable")[:count]]


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it; what a run has not written (yet) is empty or None."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    epochs: tuple[dict[str, Any], ...]
    test: dict[str, Any] | None
    step_timing: dict[str, Any] | None
    confusion: Confusion | None
    predictions: Predictions | None
    failure: str | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    @property
    def title(self) -> str:
        """The recipe's name, or the folder's."""
        return str(self.config.get("name") or self.name)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch whose weights were tested; of an unfinished run, the best one so far by the
        figure that chooses (``evaluation.select``)."""
        if self.test is not None:
            return next((row for row in self.epochs if row["epoch"] == self.test["epoch"]), None)
        select = self.config.get("evaluation", {}).get("select", "accuracy")
        sign = -1 if select == "loss" else 1
        judged = [row for row in self.epochs if row.get(f"val_{select}") is not None]
        return max(judged, key=lambda row: sign * row[f"val_{select}"], default=None)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a run that came to its end."""
    return (folder / _SUMMARY).is_file()


def is_resumable(folder: Path) -> bool:
    """Whether the folder is that of a run, which can be gone on with."""
    return (folder / _CONFIG).is_file()


def write_failure(folder: Path, error: Exception) -> None:
    """Notes that a run ended in an error that would come again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _FAILED, {"error": str(error)})


def failure(folder: Path) -> str | None:
    """Why the run failed (:func:`write_failure`); None if it did not."""
    return _read_json(folder / _FAILED).get("error")


def read_run(folder: Path) -> Run:
    """Reads the folder of a run, finished or not.

    Raises:
        RunError: it holds neither a configuration nor metrics, or a file is damaged.
    """
    if not any((folder / name).is_file() for name in (_CONFIG, "metrics.jsonl", _FAILED)):
        raise RunError(f"expected the folder of a run, with config.json, got {folder}")
    events = _read_jsonl(folder / "metrics.jsonl")
    # A run that was resumed may have written an epoch or its test a second time: the last counts.
    epochs = {row["epoch"]: row for row in events if row["event"] == "epoch"}
    last = {row["event"]: row for row in events}
    confusion = folder / "confusion.csv"
    try:
        counts = read_confusion(confusion) if confusion.is_file() else None
    except ValueError as error:
        raise RunError(str(error)) from error
    return Run(
        folder=folder,
        config=_read_json(folder / _CONFIG),
        environment=_read_json(folder / "environment.json"),
        summary=_read_json(folder / _SUMMARY),
        epochs=tuple(epochs[epoch] for epoch in sorted(epochs)),
        test=last.get("test"),
        step_timing=last.get("step_timing"),
        confusion=counts,
        predictions=_read_predictions(folder / "predictions.npz"),
        failure=failure(folder),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break  # the run was killed, or is just writing it
            raise RunError(f"{path}, line {number}: expected JSON, got: {error}") from error
        if not isinstance(row, dict) or "event" not in row:
            raise RunError(f'{path}, line {number}: expected an object with "event", got {line!r}')
        rows.append(row)
    return rows


def _read_predictions(path: Path) -> Predictions | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        predictions = Predictions(
            *(arrays[name] for name in ("probabilities", "labels", "index")), arrays.get("grades")
        )
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or predictions.probabilities.ndim != 2:
            raise ValueError(f"the lengths {lengths}")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f"{path}: expected the arrays probabilities [N, C], labels [N] and index [N], "
            f"got: {error}"
        ) from error
    return predictions
