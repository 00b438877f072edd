# SPDX-License-Identifier: Apache-2.0
"""Several runs beside each other: what differs between them, and what came of it."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastresnet.files import write_atomically
from fastresnet.train.pages import draw, flatten, number, percent, render, text
from fastresnet.train.plots import OVERLAID, Line, line_style, overlay_figure, save_png
from fastresnet.train.run_directory import Run

_SEED = "seed"
_NAMED_BY_SETTINGS = 3  # where more settings differ, runs go by the names of their folders


@dataclass(frozen=True)
class Spread:
    """Values of several seeds: their mean, and the standard deviation of the sample (None of a
    single one)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """The mean; None where there is no value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation, divided by n - 1."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    label: str
    runs: tuple[Run, ...]

    @property
    def best_accuracy(self) -> Spread:
        """Validation accuracy of the epochs that were chosen."""
        return _spread(run.best and run.best.get("val_accuracy") for run in self.runs)

    def test(self, key: str) -> Spread:
        """A figure of the test."""
        return _spread((run.test or {}).get(key) for run in self.runs)

    @property
    def speed(self) -> Spread:
        """Training images a second, the median epoch of each run."""
        return _spread(
            statistics.median(speeds)
            for run in self.runs
            if (speeds := [row["images_per_second"] for row in run.epochs])
        )

    @property
    def recall(self) -> dict[str, Spread]:
        """The recall of each class; of a class without test images there is none."""
        values: dict[str, list[float]] = {}
        for run in self.runs:
            if run.confusion:
                for name, recall in zip(run.confusion.classes, run.confusion.recall, strict=True):
                    seen = values.setdefault(name, [])
                    if np.isfinite(recall):
                        seen.append(float(recall))
        return {name: Spread(tuple(recalls)) for name, recalls in values.items()}

    @property
    def note(self) -> str:
        """What is to be known of runs that did not come to their end."""
        notes = []
        for run in self.runs:
            if run.failure:
                notes.append(f"{run.name} failed: {run.failure}")
            elif not run.finished:
                notes.append(f"{run.name} is not finished")
        return "; ".join(notes)


@dataclass(frozen=True)
class Comparison:
    """Groups of runs in the order in which they were given, and the settings that differ."""

    groups: tuple[Group, ...]
    differences: dict[str, tuple[Any, ...]]  # a setting's value in each group
    environment: dict[str, tuple[Any, ...]]  # likewise of versions and machines; None: several

    @property
    def title(self) -> str:
        """The recipe, if there is one only."""
        return " and ".join(dict.fromkeys(run.title for run in self._runs))

    @property
    def data(self) -> list[str]:
        """The data sets that the runs were tested on, with where they were read from."""
        sources = (
            (run.summary.get("dataset"), run.summary.get("source"))
            for run in self._runs
            if run.summary.get("dataset")
        )
        return [
            f"{name}, read from {source}" if source else str(name)
            for name, source in dict.fromkeys(sources)
        ]

    @property
    def same_test(self) -> bool:
        """Whether, as far as can be seen, all runs were tested on the same images: equally many of
        each class, from one place."""
        tests = {
            (run.confusion.classes, *run.confusion.support.tolist())
            for run in self._runs
            if run.confusion
        }
        return len(tests) <= 1 and len(self.data) <= 1

    @property
    def has_kappa(self) -> bool:
        """Whether labels are grades."""
        return any(group.test("kappa").values for group in self.groups)

    @property
    def leader(self) -> Group | None:
        """The group of the highest test kappa, or else test accuracy; None before any test."""
        key = "kappa" if self.has_kappa else "accuracy"
        tested = [group for group in self.groups if group.test(key).values]
        return max(tested, key=lambda group: group.test(key).mean, default=None)

    @property
    def classes(self) -> list[str]:
        """The classes of all runs that were tested."""
        return list(dict.fromkeys(name for group in self.groups for name in group.recall))

    @property
    def _runs(self) -> Iterable[Run]:
        return (run for group in self.groups for run in group.runs)


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Groups runs whose configurations differ in the seed only, and finds what else differs."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in flatten(run.config) if name != _SEED}
        # A run without a configuration is like no other.
        grouped.setdefault(json.dumps(settings or str(run.folder), sort_keys=True), []).append(run)
    members = [tuple(group) for group in grouped.values()]
    differences = _differences([dict(flatten(group[0].config)) for group in members])
    differences.pop(_SEED, None)
    environment = _differences([_common(group) for group in members])
    labels = _labels(members, differences)
    return Comparison(
        tuple(Group(label, group) for label, group in zip(labels, members, strict=True)),
        differences,
        environment,
    )


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Writes ``compare.html``, ``compare.png``, ``compare.csv`` (a row a run) and, where runs were
    tested, ``compare_classes.csv`` (the recall of each class); returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder / "compare.csv", _rows(comparison))
    if comparison.classes:
        _write_table(folder / "compare_classes.csv", _class_rows(comparison))
    lines = [
        Line(group.label, tuple(run.epochs for run in group.runs)) for group in comparison.groups
    ]
    every = [row for line in lines for rows in line.runs for row in rows]
    panels = [one for one in OVERLAID if any(row.get(one.key) is not None for row in every)]
    if panels:
        figure = overlay_figure(lines, panels, legend=True)
        save_png(figure, folder / "compare.png", title=comparison.title)
    page = render(
        "compare.html",
        comparison=comparison,
        runs=sum(len(group.runs) for group in comparison.groups),
        rows=[_row(comparison, position) for position in range(len(comparison.groups))],
        drawings=[
            draw(
                overlay_figure(lines, [panel], legend=False),
                name=panel.key,
                alt=f"{panel.title} of each run against the epoch; "
                "the best values are in the table above",
            )
            for panel in panels
        ],
        classes=[_class_row(comparison, name) for name in comparison.classes],
    )
    path = folder / "compare.html"
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def format_spread(spread: Spread, *, share: bool) -> str:
    """A mean, with the standard deviation where there is one: percent, or four decimals."""
    if spread.mean is None:
        return percent(None)
    mean, deviation = (
        None if value is None else f"{100 * value:.2f}" if share else f"{value:.4f}"
        for value in (spread.mean, spread.deviation)
    )
    unit = "\N{NARROW NO-BREAK SPACE}%" if share else ""
    return f"{mean}{unit}" if deviation is None else f"{mean} ± {deviation}{unit}"


def _spread(values: Iterable[float | None]) -> Spread:
    return Spread(tuple(value for value in values if value is not None))


def _differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: tuple(one.get(name) for one in settings) for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def _common(runs: Sequence[Run]) -> dict[str, Any]:
    """The facts of the environment in which all of the runs agree; None for the others."""
    facts = [dict(flatten(run.environment)) for run in runs]
    changing = _differences(facts)
    return {name: None if name in changing else value for name, value in facts[0].items()}


def _labels(members: Sequence[tuple[Run, ...]], differences: Mapping[str, Any]) -> list[str]:
    if len(members) == 1 and len(members[0]) > 1:  # no seed's name stands for all of them
        return [members[0][0].title]
    if "name" in differences or not 0 < len(differences) <= _NAMED_BY_SETTINGS:
        return [group[0].name for group in members]
    return [
        ", ".join(f"{name}={text(values[row])}" for name, values in differences.items())
        for row in range(len(members))
    ]


def _row(comparison: Comparison, position: int) -> dict[str, Any]:
    """A group's row of the page's table."""
    group, first = comparison.groups[position], comparison.groups[0]
    colour, dashes = line_style(position)
    accuracy, reference = group.test("accuracy").mean, first.test("accuracy").mean
    return {
        "label": group.label,
        "colour": colour,
        "dashes": " ".join(f"{length:g}" for length in dashes),
        "leads": group is comparison.leader,
        "count": len(group.runs),
        "best_epochs": ", ".join(str(run.best["epoch"]) for run in group.runs if run.best),
        "best_accuracy": format_spread(group.best_accuracy, share=True),
        "accuracy": format_spread(group.test("accuracy"), share=True),
        "kappa": format_spread(group.test("kappa"), share=False),
        "gain": None if None in (accuracy, reference) or not position else accuracy - reference,
        "speed": number(group.speed.mean),
        "note": group.note,
    }


def _class_row(comparison: Comparison, name: str) -> dict[str, Any]:
    """A class's row of the page: the mean recall in each group, and how far it is from the first
    group's."""
    means = [group.recall.get(name, Spread(())).mean for group in comparison.groups]
    gains = [None if None in (mean, means[0]) else mean - means[0] for mean in means]
    return {"name": name, "cells": list(zip(means, gains, strict=True))}


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "run": run.name,
            "group": group.label,
            **{name: text(values[row]) for name, values in comparison.differences.items()},
            _SEED: run.config.get(_SEED),
            "best_epoch": (run.best or {}).get("epoch"),
            "val_accuracy": (run.best or {}).get("val_accuracy"),
            "test_accuracy": (run.test or {}).get("accuracy"),
            "test_loss": (run.test or {}).get("loss"),
            "test_kappa": (run.test or {}).get("kappa"),
            "state": "failed" if run.failure else "finished" if run.finished else "unfinished",
        }
        for row, group in enumerate(comparison.groups)
        for run in group.runs
    ]


def _class_rows(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "class": name,
            **{group.label: group.recall.get(name, Spread(())).mean for group in comparison.groups},
        }
        for name in comparison.classes
    ]


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
