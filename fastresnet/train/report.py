# SPDX-License-Identifier: Apache-2.0
"""What a run leaves to look at: JSON lines, curves and the confusion matrix."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a machine that trains has no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from fastresnet.train.checkpoint import write_atomically

if TYPE_CHECKING:
    from fastresnet.train.loop import History

_TRAIN_COLOUR, _VAL_COLOUR, _TEXT_COLOUR = "#7a8ba3", "#c8553d", "#333333"
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _TEXT_COLOUR,
    "text.color": _TEXT_COLOUR,
    "xtick.color": _TEXT_COLOUR,
    "ytick.color": _TEXT_COLOUR,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.15,
    "figure.constrained_layout.h_pad": 0.1,
}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file that is whole or absent."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a file of JSON lines that is whole or absent."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def plot_curves(path: Path, history: History, *, title: str) -> None:
    """Draws loss and accuracy against the epoch, with the best epoch marked, as a PNG."""
    rows, best = history.rows, history.best
    epochs = [row.epoch for row in rows]
    with plt.rc_context(_STYLE):
        figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(10, 4))
        figure.suptitle(title, x=0.01, ha="left")
        _draw_curves(loss, epochs, [row.train_loss for row in rows], [row.val_loss for row in rows])
        loss.set_title("Loss")
        _draw_curves(
            accuracy,
            epochs,
            [row.train_accuracy for row in rows],
            [row.val_accuracy for row in rows],
        )
        accuracy.set_title("Accuracy")
        accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
        accuracy.plot(
            best.epoch,
            best.val_accuracy,
            "o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=_VAL_COLOUR,
            label=f"best: {best.val_accuracy:.2%} in epoch {best.epoch}",
        )
        for axes in (loss, accuracy):
            axes.legend(frameon=False)
        figure.savefig(path, format="png")
        plt.close(figure)


def _draw_curves(
    axes: Axes, epochs: Sequence[int], train: Sequence[float], val: Sequence[float]
) -> None:
    axes.plot(epochs, train, "o-", color=_TRAIN_COLOUR, markersize=4, label="training")
    axes.plot(epochs, val, "o-", color=_VAL_COLOUR, markersize=4, label="validation")
    axes.set_xlabel("epoch")
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def normalise_rows(confusion: Tensor) -> np.ndarray:
    """The confusion matrix as shares of each true class; zeros where a class has no image."""
    counts = confusion.numpy().astype(np.float64)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def plot_confusion(path: Path, confusion: Tensor, classes: Sequence[str], *, title: str) -> None:
    """Draws the confusion matrix (int64 [classes, classes]) as counts and as shares, as a PNG."""
    shares = normalise_rows(confusion)
    count = len(classes)
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        side = 2.2 + 0.46 * count
        figure, axes = plt.subplots(1, 2, figsize=(2 * side, side), sharey=True)
        figure.suptitle(title, x=0.01, ha="left")
        panels = (
            ("Images", [[f"{value}" for value in row] for row in confusion.tolist()]),
            ("Share of the true class (%)", [[f"{100 * x:.1f}" for x in row] for row in shares]),
        )
        for panel, (heading, texts) in zip(axes, panels, strict=True):
            # Coloured by the square root: mistakes of one percent can be told from none.
            panel.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
            panel.set_title(heading)
            panel.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor")
            panel.set_yticks(range(count), classes)
            panel.set_xlabel("predicted")
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
            for row in range(count):
                for column in range(count):
                    if confusion[row, column]:
                        panel.text(
                            column,
                            row,
                            texts[row][column],
                            ha="center",
                            va="center",
                            fontsize=8,
                            color="white" if shares[row, column] > 0.4 else _TEXT_COLOUR,
                        )
        axes[0].set_ylabel("true")
        figure.savefig(path, format="png")
        plt.close(figure)


def write_confusion(folder: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """Writes ``confusion.csv`` (counts) and ``confusion_normalised.csv`` (shares of a row)."""
    _write_matrix(folder / "confusion.csv", confusion.tolist(), classes)
    shares = [[f"{share:.6f}" for share in row] for row in normalise_rows(confusion)]
    _write_matrix(folder / "confusion_normalised.csv", shares, classes)


def _write_matrix(path: Path, rows: Iterable[Sequence[object]], classes: Sequence[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, rows, strict=True))
