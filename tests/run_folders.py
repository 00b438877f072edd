# SPDX-License-Identifier: Apache-2.0
"""Folders as runs leave them, made up in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastresnet.train.confusion import write_confusion
from fastresnet.train.run_directory import write_json


def write_run(
    folder: Path,
    *,
    name: str = "recipe",
    lr: float = 0.1,
    seed: int = 0,
    epochs: int = 3,
    classes: Sequence[str] = ("cat", "dog", "owl"),
    images: int = 300,
    accuracy: float = 0.8,
    ordinal: bool = False,
    regression: bool = False,
    dataset: str = "zoo",
) -> Path:
    """Writes every file of a finished run of about the given accuracy; returns ``folder``."""
    folder.mkdir(parents=True)
    generator = np.random.Generator(np.random.Philox(key=seed))
    count = len(classes)
    labels = np.arange(images) * 7 % count  # the test set is that of all seeds
    right = generator.random(images) < accuracy
    near = np.clip(labels + generator.choice((-1, 1, 2), size=images), 0, count - 1)
    predicted = np.where(right, labels, near)
    confidence = generator.uniform(1 / count + 0.05, 1, size=images).astype(np.float32)
    probabilities = np.repeat((1 - confidence[:, None]) / (count - 1), count, axis=1)
    probabilities[np.arange(images), predicted] = confidence
    arrays = {"probabilities": probabilities, "labels": labels, "index": np.arange(images)}
    if regression:
        arrays["grades"] = (predicted + generator.uniform(-0.5, 0.5, images)).astype(np.float32)
    np.savez(folder / "predictions.npz", **arrays)

    counts = np.zeros((count, count), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    write_confusion(folder, torch.from_numpy(counts), classes)
    tested = float((labels == predicted).mean())
    rows = [_epoch(epoch, epochs, lr, tested, generator, ordinal) for epoch in range(1, epochs + 1)]
    test: dict[str, Any] = {"loss": 0.5, "accuracy": tested, "images": images, "recall": [tested]}
    if ordinal:
        test |= {"kappa": 0.75 * tested, "auc": 0.9}
    timing = {
        "batch_size": 16,
        "image_size": 32,
        "steps": 5,
        "seconds": 0.040,
        "peer_seconds": 0.050,
        "error": 1e-3,
        "peer_error": 1.1e-3,
        "speedup": 1.25,
        "outputs_agree": True,
    }
    config = {
        "name": name,
        "data": {"dataset": dataset, "batch_size": 16},
        "model": {"name": "resnet18"},
        "schedule": {"epochs": epochs, "sizes": [16, 32]},
        "optim": {"lr": lr},
        "seed": seed,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "environment.json", {"versions": {"torch": "2.14"}, "machine": {"gpu": []}})
    add_events(
        folder,
        *({"event": "epoch", **row} for row in rows),
        {"event": "test", "epoch": epochs, **test},
        {"event": "step_timing", **timing},
    )
    summary = {"dataset": dataset, "source": "made up", "seconds": 90.0, "threads": 2}
    write_json(folder / "summary.json", summary)
    return folder


def add_events(folder: Path, *rows: dict[str, Any]) -> None:
    """Appends rows to ``metrics.jsonl``."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` that are of one kind."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def _epoch(
    epoch: int,
    epochs: int,
    lr: float,
    accuracy: float,
    generator: np.random.Generator,
    ordinal: bool,
) -> dict[str, Any]:
    progress = 1 - 0.6 ** (6 * epoch / epochs)
    noise = generator.normal(0, 0.01, size=4).tolist()
    row = {
        "epoch": epoch,
        "image_size": 32,
        "learning_rate": lr * (1 - (epoch - 1) / epochs),
        "train_loss": 2.5 - accuracy * 2 * progress + noise[0],
        "train_accuracy": min(accuracy * (0.4 + 0.63 * progress) + noise[1], 1.0),
        "val_loss": 2.5 - accuracy * 1.8 * progress + noise[2],
        "val_accuracy": min(accuracy * (0.4 + 0.6 * progress) + noise[3], 1.0),
        "images_per_second": 1000.0 + epoch,
        "seconds": 12.0,
        "data_seconds": 0.6,
    }
    if ordinal:
        row |= {"val_kappa": 0.75 * row["val_accuracy"], "val_auc": 0.9}
    return row
