# SPDX-License-Identifier: Apache-2.0
"""Figures of runs. A figure is drawn once; it is saved as a PNG file, or as an SVG element whose
colours and fonts are those of the page that holds it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastresnet.train.confusion import Confusion

# The colours of figures and pages by name: on a light ground and on a dark one. Text has a contrast
# of at least 4.5 to its ground, lines of at least 3.
COLOURS = {
    "ground": ("#ffffff", "#171a1f"),
    "text": ("#1e2329", "#e9ebee"),
    "muted": ("#59626e", "#a2abb7"),
    "edge": ("#8b949e", "#737d89"),
    "grid": ("#e7e9ec", "#2b3037"),
    "grey": ("#7a8592", "#8e98a5"),
    "blue": ("#2563a8", "#77aef0"),
    "orange": ("#a9401e", "#f0906b"),
    "green": ("#2c8055", "#6cc598"),
    "purple": ("#8450ad", "#c199e6"),
    "ochre": ("#8f6a08", "#d9b04a"),
    "pink": ("#b83a7d", "#ee8dbf"),
    "teal": ("#0f7885", "#5fc4d0"),
}
_LINE_COLOURS = ("blue", "orange", "green", "purple", "ochre", "pink", "teal", "grey")
_DASHES = ((), (5, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5))
_LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _LIGHT["text"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LIGHT["edge"],
    "axes.labelcolor": _LIGHT["muted"],
    "text.color": _LIGHT["text"],
    "xtick.color": _LIGHT["edge"],
    "ytick.color": _LIGHT["edge"],
    "xtick.labelcolor": _LIGHT["muted"],
    "ytick.labelcolor": _LIGHT["muted"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LIGHT["grid"],
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "fastresnet",  # the same figure is the same bytes
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.08,
}
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")
_PANEL = (4.2, 2.8)  # inches: a page shows it at about this size
_MARKED_EPOCHS = 15  # more points than these are a line without marks
_NUMBERED_CLASSES = 25  # more classes than these have no numbers in their cells


@dataclass(frozen=True)
class Quantity:
    """What is drawn against the epoch: keys of an epoch's row, by the label of their line."""

    title: str
    keys: Mapping[str, str]
    percent: bool = False

    def recorded(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """The keys that any of the rows has."""
        return {
            label: key
            for label, key in self.keys.items()
            if any(row.get(key) is not None for row in rows)
        }


LOSS = Quantity("Loss", {"training": "train_loss", "validation": "val_loss"})
ACCURACY = Quantity(
    "Accuracy", {"training": "train_accuracy", "validation": "val_accuracy"}, percent=True
)
KAPPA = Quantity("Quadratic weighted kappa", {"validation": "val_kappa"})
LEARNING_RATE = Quantity("Learning rate", {"learning rate": "learning_rate"})


@dataclass(frozen=True)
class Panel:
    """One quantity of several runs: a key of an epoch's row."""

    title: str
    key: str
    percent: bool = False


OVERLAID = (
    Panel("Validation accuracy", "val_accuracy", percent=True),
    Panel("Validation loss", "val_loss"),
    Panel("Training accuracy", "train_accuracy", percent=True),
    Panel("Training loss", "train_loss"),
    Panel("Validation kappa, quadratic weights", "val_kappa"),
    Panel("Learning rate", "learning_rate"),
)


@dataclass(frozen=True)
class Line:
    """One run, or the runs of several seeds, in a figure that overlays them."""

    label: str
    runs: tuple[tuple[Mapping[str, Any], ...], ...]  # the epochs of each


def line_style(position: int) -> tuple[str, tuple[float, ...]]:
    """The name of the colour and the dashes (lengths on and off, in widths of the line; none: an
    unbroken line) of a comparison's line, counted from 0."""
    rounds, colour = divmod(position, len(_LINE_COLOURS))
    return _LINE_COLOURS[colour], _DASHES[rounds % len(_DASHES)]


def curves_figure(
    rows: Sequence[Mapping[str, Any]], quantities: Sequence[Quantity], *, best: int | None
) -> Figure:
    """Quantities of one run against the epoch, side by side, the best epoch marked."""
    with rc_context(_STYLE):
        figure, places = _grid(len(quantities), columns=len(quantities))
        for axes, quantity in zip(places, quantities, strict=True):
            _epoch_axes(axes, quantity.title, percent=quantity.percent)
            for label, key in quantity.recorded(rows).items():
                validation = label == "validation"
                colour = _LIGHT["grey" if label == "training" else "blue"]
                _line(axes, rows, key, color=colour, label=label, zorder=3 if validation else 2)
                if validation:
                    _mark_best(axes, rows, key, best, quantity.percent)
            _from_first_epoch(axes)
            if len(axes.lines) > 1:
                axes.legend()
    return figure


def overlay_figure(lines: Sequence[Line], panels: Sequence[Panel], *, legend: bool) -> Figure:
    """Several runs over each other; the mean of several seeds is drawn over their thin lines."""
    with rc_context(_STYLE):
        figure, places = _grid(len(panels), columns=min(len(panels), 2))
        for axes, panel in zip(places, panels, strict=True):
            _epoch_axes(axes, panel.title, percent=panel.percent)
            for position, line in enumerate(lines):
                _overlay(axes, line, panel.key, position)
            _from_first_epoch(axes)
        if legend:
            handles, labels = places[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower left", ncols=2)
    return figure


def shade(shares: np.ndarray) -> np.ndarray:
    """How much of its colour a cell of the confusion matrix has, from its share of the row.

    It grows as the square root, so that mistakes of one percent can be told from none, with a step
    at one half: dark text up to there, and light text above it, have a contrast of at least 4.5.
    """
    return np.where(shares <= 0.5, 0.75 * np.sqrt(shares), 0.85 + 0.3 * (shares - 0.5))


def recall_figure(confusion: Confusion) -> Figure:
    """The recall of each class as a bar, beside the share of all images predicted right."""
    count = len(confusion.classes)
    with rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(6, 1.2 + 0.24 * count), layout="constrained")
        axes = figure.subplots()
        recall = np.nan_to_num(confusion.recall)
        axes.barh(range(count), recall, height=0.7, color=_LIGHT["blue"])
        for row, (share, images) in enumerate(zip(recall, confusion.support, strict=True)):
            text = f"{share:.1%} of {images:,}" if images else "no image"
            axes.text(1.03, row, text, va="center", fontsize=8, color=_LIGHT["muted"])
        accuracy = confusion.counts.trace() / max(confusion.images, 1)
        axes.axvline(accuracy, color=_LIGHT["orange"], linewidth=1, linestyle=(0, (4, 3)))
        axes.set_title(f"Recall of each class, and accuracy ({accuracy:.2%}, dashed)")
        axes.set_yticks(range(count), confusion.classes)
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlim(0, 1.02)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


def confusion_figure(confusion: Confusion) -> Figure:
    """The confusion matrix as counts and as shares of the true class: right answers in blue,
    mistakes in orange."""
    count = len(confusion.classes)
    numbered = count <= _NUMBERED_CLASSES
    side = min(2.2 + 0.46 * count, 14)
    size = {"fontsize": float(np.clip(0.6 * 72 * (side - 2) / count, 3, 9))}
    shares = confusion.shares
    # What the counts' colours mean only matters where the counts themselves cannot be read.
    counts = shares if numbered else confusion.counts / max(confusion.counts.max(), 1)
    panels = (
        ("Images", counts, [[f"{value}" for value in row] for row in confusion.counts]),
        (
            "Share of the true class (%)",
            shares,
            [[f"{100 * x:.1f}" for x in row] for row in shares],
        ),
    )
    right, wrong = np.array(to_rgb(_LIGHT["blue"])), np.array(to_rgb(_LIGHT["orange"]))
    full = np.where(np.eye(count, dtype=bool)[..., None], right, wrong)
    with rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(2 * side, side), layout="constrained")
        places = figure.subplots(1, 2, sharey=True)
        for axes, (heading, values, cells) in zip(places, panels, strict=True):
            strength = shade(values)[..., None]
            axes.imshow((1 - strength) + strength * full, interpolation="nearest")
            axes.set_title(heading)
            axes.set_xticks(
                range(count),
                confusion.classes,
                rotation=45 if numbered else 90,
                ha="right",
                va="top" if numbered else "center",
                rotation_mode="anchor",
                **size,
            )
            axes.set_yticks(range(count), confusion.classes, **size)
            axes.set_xlabel("predicted")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            for row, column in np.argwhere(confusion.counts) if numbered else ():
                strong = values[row, column] > 0.5
                axes.text(
                    column,
                    row,
                    cells[row][column],
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=_LIGHT["ground" if strong else "text"],
                )
        places[0].set_ylabel("true")
    return figure


def save_png(figure: Figure, path: Path, *, title: str | None = None) -> None:
    """Writes the figure as a PNG of 150 dots an inch."""
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", color=_LIGHT["text"], fontsize=11)
    with rc_context(_STYLE):
        figure.savefig(path, format="png")


def to_svg(figure: Figure, *, name: str) -> str:
    """The figure as an ``<svg>`` element for an HTML page.

    Colours become the page's custom properties (``var(--blue)``), so that they follow its scheme;
    ids begin with ``name``, which must be unlike that of any other figure of the page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\b(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    return re.sub("|".join(_NAMES), lambda found: f"var(--{_NAMES[found[0]]})", text)


_NAMES = {light: name for name, light in _LIGHT.items()}


def _grid(count: int, *, columns: int) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    size = (columns * _PANEL[0], rows * _PANEL[1])
    figure = Figure(figsize=size, layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in places[count:]:
        unused.remove()
    return figure, places[:count]


def _epoch_axes(axes: Axes, title: str, *, percent: bool) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if percent:
        axes.yaxis.set_major_formatter(_PERCENT)


def _from_first_epoch(axes: Axes) -> None:
    """There is no epoch 0 to have a tick."""
    axes.set_xlim(left=max(axes.get_xlim()[0], 0.5))


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    epochs, values = _points(rows, key)
    marker = {"marker": "o", "markersize": 3.5} if len(epochs) <= _MARKED_EPOCHS else {}
    axes.plot(epochs, values, **{"linewidth": 1.6, **marker, **style})


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _mark_best(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, best: int | None, percent: bool
) -> None:
    for row in rows:
        if row["epoch"] == best and row.get(key) is not None:
            value = f"{row[key]:.2%}" if percent else f"{row[key]:.4g}"
            axes.plot(
                best,
                row[key],
                "o",
                markersize=9,
                markerfacecolor="none",
                markeredgecolor=_LIGHT["blue"],
                label=f"epoch {best}: {value}",
            )


def _overlay(axes: Axes, line: Line, key: str, position: int) -> None:
    name, dashes = line_style(position)
    style: dict[str, Any] = {"color": _LIGHT[name], "linestyle": (0, dashes) if dashes else "solid"}
    values: dict[int, list[float]] = {}
    for rows in line.runs:
        for epoch, value in zip(*_points(rows, key), strict=True):
            values.setdefault(epoch, []).append(value)
        if len(line.runs) > 1:
            axes.plot(*_points(rows, key), **style, linewidth=0.7, alpha=0.45)
    means = [{"epoch": epoch, key: float(np.mean(values[epoch]))} for epoch in sorted(values)]
    _line(axes, means, key, **style, label=line.label)
