# SPDX-License-Identifier: Apache-2.0
"""The figure of a data set: how many images each class has, how large they are, how bright."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: a machine that trains has no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from fastresnet.data.stats import DatasetStats

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}
_PARTS = {"train": "#2563a8", "validation": "#2c8055", "test": "#bf4a26"}
_CHANNELS = {1: ("#59626e",), 3: ("#bf4a26", "#2c8055", "#2563a8")}
_NAMED_CLASSES, _NAMED_SIZES = 30, 12


def plot_stats(path: Path, stats: DatasetStats) -> None:
    """Draws label counts, sizes and the levels of each channel, as a PNG."""
    with plt.rc_context(_STYLE):
        figure, (labels, sizes, levels) = plt.subplots(
            1, 3, figsize=(13, 4), width_ratios=(1.4, 1, 1)
        )
        images = sum(map(sum, stats.counts.values()))
        figure.suptitle(f"{stats.name}: {images:,} images", x=0.01, ha="left")
        _draw_labels(labels, stats)
        _draw_sizes(sizes, stats)
        _draw_levels(levels, stats)
        figure.savefig(path, format="png")
        plt.close(figure)


def _draw_labels(axes: Axes, stats: DatasetStats) -> None:
    places, width = np.arange(len(stats.classes)), 0.8 / len(stats.counts)
    for number, (part, counts) in enumerate(stats.counts.items()):
        offset = (number - (len(stats.counts) - 1) / 2) * width
        label = f"{part}: {sum(counts):,}"
        axes.bar(places + offset, counts, width, color=_PARTS[part], label=label)
    axes.set_title("Images of each class")
    if len(stats.classes) <= _NAMED_CLASSES:
        axes.set_xticks(places, stats.classes, rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.set_xlabel("number of the class")
    axes.legend()


def _draw_sizes(axes: Axes, stats: DatasetStats) -> None:
    frequent = list(stats.sizes.items())[:_NAMED_SIZES]
    names = [f"{width} x {height}" for (width, height), _ in frequent]
    counts = [images for _, images in frequent]
    rest = list(stats.sizes.values())[_NAMED_SIZES:]
    if rest:
        names.append(f"{len(rest)} others")
        counts.append(sum(rest))
    axes.barh(names, counts, color="#7a8592")
    axes.set_ylim(max(len(names), 6) - 0.5, -0.5)  # downwards; a lone size fills no more than a bar
    axes.set_title("Images of each size (width x height)")


def _draw_levels(axes: Axes, stats: DatasetStats) -> None:
    values = np.linspace(0, 1, stats.levels.shape[1])
    for shares, colour, mean, std in zip(
        stats.levels, _CHANNELS[len(stats.levels)], stats.mean, stats.std, strict=True
    ):
        label = f"mean {mean:.4f}, deviation {std:.4f}"
        axes.plot(values, 100 * shares, color=colour, linewidth=1, label=label)
        axes.axvline(mean, color=colour, linewidth=0.8, linestyle="dashed")
    # Black borders would leave nothing else to see.
    axes.set_ylim(0, 1.1 * max(100 * stats.levels[:, 2:-2].max(), 1e-3))
    axes.set_xlabel("value of a pixel")
    axes.set_ylabel("% of pixels")
    axes.set_title(f"Channels, from {stats.sample:,} training images")
    axes.legend()
