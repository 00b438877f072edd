# SPDX-License-Identifier: Apache-2.0
"""The files that a run leaves: pictures are pictures, tables hold the numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import matplotlib.image
import pytest
import torch

from fastresnet.train.loop import EpochRow, History
from fastresnet.train.report import (
    append_jsonl,
    plot_confusion,
    plot_curves,
    write_confusion,
    write_json,
    write_jsonl,
)

CONFUSION = torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
CLASSES = ("cat", "dog, small", "none")


def history(epochs: int) -> History:
    return History(
        tuple(
            EpochRow(
                epoch=epoch,
                image_size=32,
                learning_rate=0.1,
                train_loss=1 / epoch,
                train_accuracy=1 - 0.5 / epoch,
                val_loss=1.1 / epoch,
                val_accuracy=1 - 0.6 / epoch,
                images_per_second=100.0,
                seconds=1.0,
            )
            for epoch in range(1, epochs + 1)
        )
    )


def assert_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.01  # not blank


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_curves(tmp_path: Path, epochs: int) -> None:
    plot_curves(tmp_path / "curves.png", history(epochs), title="run")
    assert_picture(tmp_path / "curves.png")


def test_confusion_picture(tmp_path: Path) -> None:
    plot_confusion(tmp_path / "confusion.png", CONFUSION, CLASSES, title="run")
    assert_picture(tmp_path / "confusion.png")


def test_confusion_tables(tmp_path: Path) -> None:
    write_confusion(tmp_path, CONFUSION, CLASSES)
    with (tmp_path / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == list(CLASSES)
    assert [row[0] for row in rows[1:]] == list(CLASSES)
    assert [[int(value) for value in row[1:]] for row in rows[1:]] == CONFUSION.tolist()
    with (tmp_path / "confusion_normalised.csv").open(newline="") as file:
        shares = [[float(value) for value in row[1:]] for row in list(csv.reader(file))[1:]]
    # The class without an image has a row of zeros, not a division by zero.
    assert shares == [[0.8, 0.2, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]


def test_json_files(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"accuracy": 0.5})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"accuracy": 0.5}
    write_jsonl(tmp_path / "metrics.jsonl", [{"epoch": 1}])
    append_jsonl(tmp_path / "metrics.jsonl", {"epoch": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
