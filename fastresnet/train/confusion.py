# SPDX-License-Identifier: Apache-2.0
"""The confusion matrix: counts, shares, what they say of each class, and the CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Confusion:
    """``counts`` (int64 [C, C]), in which row is the true class and column the predicted one."""

    counts: np.ndarray
    classes: tuple[str, ...]

    @property
    def images(self) -> int:
        """Images counted."""
        return int(self.counts.sum())

    @property
    def support(self) -> np.ndarray:
        """Images of each class (int64 [C])."""
        return self.counts.sum(axis=1)

    @property
    def shares(self) -> np.ndarray:
        """Counts as shares of each true class (float64 [C, C])."""
        return normalise_rows(self.counts)

    @property
    def recall(self) -> np.ndarray:
        """Share of each class's images that were predicted right; nan where there are none."""
        return _ratio(self.counts.diagonal(), self.support)

    @property
    def precision(self) -> np.ndarray:
        """Share of the predictions of each class that were right; nan where there are none."""
        return _ratio(self.counts.diagonal(), self.counts.sum(axis=0))

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of recall and precision; nan for a class neither seen nor predicted."""
        return _ratio(2 * self.counts.diagonal(), self.support + self.counts.sum(axis=0))

    @property
    def majority(self) -> tuple[str, float]:
        """The most frequent class, and the accuracy of always answering it."""
        index = int(self.support.argmax())
        return self.classes[index], float(self.support[index] / max(self.images, 1))

    def mistakes(self) -> list[tuple[int, int, int]]:
        """The pairs that were confused, as (true, predicted, images), the most frequent first."""
        wrong = self.counts * (1 - np.eye(len(self.classes), dtype=np.int64))
        order = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
        rows, columns = np.unravel_index(order, wrong.shape)
        return [
            (int(row), int(column), int(wrong[row, column]))
            for row, column in zip(rows, columns, strict=True)
        ]


def normalise_rows(counts: np.ndarray) -> np.ndarray:
    """Counts as shares of each row (float64); zeros where a row has none."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return part / whole


def write_confusion(folder: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """Writes ``confusion.csv`` (counts) and ``confusion_normalised.csv`` (shares of a row)."""
    counts = confusion.numpy()
    _write_matrix(folder / "confusion.csv", counts.tolist(), classes)
    shares = [[f"{share:.6f}" for share in row] for row in normalise_rows(counts)]
    _write_matrix(folder / "confusion_normalised.csv", shares, classes)


def read_confusion(path: Path) -> Confusion:
    """Reads a ``confusion.csv`` of :func:`write_confusion`.

    Raises:
        ValueError: it is not a square table of counts whose rows are named as its columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    classes = header[1:]
    if not classes or [row[0] for row in rows] != classes:
        raise ValueError(
            f"{path}: expected a column and a row for each class, got columns {classes} and rows "
            f"{[row[0] for row in rows]}"
        )
    try:
        counts = [[int(value) for value in row[1:]] for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: expected counts, got: {error}") from error
    for name, row in zip(classes, counts, strict=True):
        if len(row) != len(classes):
            raise ValueError(f"{path}: expected {len(classes)} counts of {name}, got {len(row)}")
    return Confusion(np.array(counts, dtype=np.int64), tuple(classes))


def _write_matrix(path: Path, rows: Iterable[Sequence[object]], classes: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, rows, strict=True))
