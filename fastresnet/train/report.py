# SPDX-License-Identifier: Apache-2.0
"""The report of one run: PNG plots, and a page that shows everything the run's folder tells."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastresnet.files import write_atomically
from fastresnet.train.confusion import Confusion
from fastresnet.train.pages import (
    Drawing,
    draw,
    duration,
    flatten,
    number,
    percent,
    render,
    thumbnail,
)
from fastresnet.train.plots import (
    ACCURACY,
    KAPPA,
    LEARNING_RATE,
    LOSS,
    Quantity,
    confusion_figure,
    curves_figure,
    recall_figure,
    save_png,
)
from fastresnet.train.run_directory import Run, read_run

_PNG_CURVES = {
    "curves.png": (LOSS, ACCURACY),
    "learning_rate.png": (LEARNING_RATE,),
    "kappa.png": (KAPPA,),
}
_PAGE_CURVES = (LOSS, ACCURACY, KAPPA, LEARNING_RATE)
_MISTAKES = 24
_SMALL = 64  # pixels: smaller images are shown with their pixels to be seen
_HEADLINE = ("epoch", "accuracy", "kappa", "images", "majority")  # shown there, not as tiles
_LABELS = {"loss": "test loss", "auc": "AUC of referable grades"}


@dataclass(frozen=True)
class Fact:
    """A figure with its name, and a remark below it."""

    label: str
    value: str
    note: str = ""


def write_report(folder: Path, *, image: Callable[[int], np.ndarray | None] | None = None) -> Path:
    """Draws the plots of a run and writes ``report.html``, from the files in its folder.

    A file that the run has not written is said to be missing on the page, and its plots are left
    out. Written are ``curves.png``, ``learning_rate.png``, ``kappa.png`` (where the epochs have
    one), ``confusion.png``, ``recall.png`` and ``report.html``.

    Args:
        folder: the folder of a run.
        image: gives the pixels of a test image, uint8 [H, W, C] of 1 or 3 channels, by the index
            that ``predictions.npz`` has for it, or None where it cannot be read; without it the
            worst mistakes have no pictures.

    Returns:
        The path of the page.

    Raises:
        RunError: this is not the folder of a run, or a file in it is damaged.
    """
    run = read_run(folder)
    write_plots(run)
    page = render("report.html", **_page(run, image))
    path = folder / "report.html"
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def write_plots(run: Run) -> None:
    """Draws the PNG files of a run into its folder."""
    best = run.best and run.best["epoch"]
    for name, quantities in _PNG_CURVES.items():
        drawn = [quantity for quantity in quantities if quantity.recorded(run.epochs)]
        if drawn:
            figure = curves_figure(run.epochs, drawn, best=best)
            save_png(figure, run.folder / name, title=run.title)
    if run.confusion:
        title = f"{run.title}: {run.confusion.images:,} test images"
        save_png(confusion_figure(run.confusion), run.folder / "confusion.png", title=title)
        save_png(recall_figure(run.confusion), run.folder / "recall.png", title=title)


def _page(run: Run, image: Callable[[int], np.ndarray | None] | None) -> dict[str, Any]:
    test, confusion, predictions = run.test or {}, run.confusion, run.predictions
    return {
        "run": run,
        "best": run.best,
        "model": run.config.get("model", {}).get("name", "network"),
        "dataset": run.summary.get("dataset") or run.config.get("data", {}).get("dataset", ""),
        "accuracy": test.get("accuracy"),
        "kappa": test.get("kappa"),
        "images": confusion.images if confusion else None,
        "majority": confusion and dict(zip(("name", "share"), confusion.majority, strict=True)),
        "facts": _facts(run),
        "curves": [_curve(run, one) for one in _PAGE_CURVES if one.recorded(run.epochs)],
        "epoch_columns": list(dict.fromkeys(key for row in run.epochs for key in _numbers(row))),
        "confusion": confusion,
        "classes": _classes(confusion) if confusion else [],
        "wrong": int((predictions.predicted != predictions.labels).sum()) if predictions else 0,
        "mistakes": _mistakes(run, image),
        "speed": _speed(run),
        "timing": run.step_timing,
        "configuration": _groups(run.config),
        "environment": _groups(run.environment),
    }


def _facts(run: Run) -> list[Fact]:
    facts = [
        Fact(_LABELS.get(key, key.replace("_", " ")), number(value))
        for key, value in _numbers(run.test or {}).items()
        if key not in _HEADLINE
    ]
    if run.confusion:
        recall = run.confusion.recall
        worst = int(np.nanargmin(recall)) if np.isfinite(recall).any() else 0
        facts.append(
            Fact("lowest recall", percent(float(recall[worst]), 1), run.confusion.classes[worst])
        )
    if run.best:
        select = run.config.get("evaluation", {}).get("select", "accuracy")
        value = run.best.get(f"val_{select}")
        chosen = percent(value) if select == "accuracy" else number(value)
        planned = run.config.get("schedule", {}).get("epochs", len(run.epochs))
        facts.append(
            Fact(
                "best epoch",
                f"{run.best['epoch']} of {planned}",
                f"validation {select} {chosen}",
            )
        )
    if run.summary.get("seconds"):
        facts.append(Fact("time in all", duration(run.summary["seconds"])))
    return facts


def _speed(run: Run) -> list[Fact]:
    facts = []
    speeds = [row["images_per_second"] for row in run.epochs if row.get("images_per_second")]
    if speeds:
        facts.append(Fact("training images/s", number(statistics.median(speeds)), "median epoch"))
    seconds = [row["seconds"] for row in run.epochs if row.get("seconds")]
    if seconds:
        facts.append(Fact("an epoch", duration(statistics.median(seconds)), "with validation"))
    waits = [row["data_seconds"] for row in run.epochs if row.get("data_seconds") is not None]
    if waits and seconds:
        share = percent(sum(waits) / sum(seconds), 1)
        facts.append(Fact("waiting for data", share, f"of the time, {duration(sum(waits))}"))
    for key in ("device", "amp", "threads", "processes"):
        if run.summary.get(key) is not None:
            facts.append(Fact(key, str(run.summary[key])))
    if run.summary.get("loader"):
        # "native (the fastest for a CPU), 2 threads": its name, and what else there is to say.
        loader = str(run.summary["loader"])
        name = re.match(r"[^(,]*", loader)[0].rstrip()
        facts.append(Fact("loader", name, loader[len(name) :].strip(" ,")))
    return facts


def _curve(run: Run, quantity: Quantity) -> Drawing:
    best, last = run.best and run.best["epoch"], run.epochs[-1]
    ends = ", ".join(
        f"{label} {percent(last.get(key)) if quantity.percent else number(last.get(key))}"
        for label, key in quantity.recorded(run.epochs).items()
    )
    return draw(
        curves_figure(run.epochs, [quantity], best=best),
        name=quantity.title.split()[0].lower(),
        alt=f"{quantity.title} against the epoch; at the end: {ends}",
    )


def _classes(confusion: Confusion) -> list[dict[str, Any]]:
    recall, precision, f1 = (
        [float(value) if np.isfinite(value) else None for value in values]
        for values in (confusion.recall, confusion.precision, confusion.f1)
    )
    wrong = confusion.counts.copy()
    np.fill_diagonal(wrong, 0)
    return [
        {
            "name": name,
            "support": int(confusion.support[row]),
            "recall": recall[row],
            "precision": precision[row],
            "f1": f1[row],
            "mistaken": confusion.classes[wrong[row].argmax()] if wrong[row].any() else None,
            "mistaken_images": int(wrong[row].max()),
        }
        for row, name in enumerate(confusion.classes)
    ]


def _mistakes(run: Run, image: Callable[[int], np.ndarray | None] | None) -> list[dict[str, Any]]:
    predictions = run.predictions
    if predictions is None:
        return []
    classes, grades = run.confusion and run.confusion.classes, predictions.grades
    mistakes = []
    for position in predictions.worst(_MISTAKES):
        index = int(predictions.index[position])
        true, predicted = (
            classes[label] if classes else f"class {label}"
            for label in (predictions.labels[position], predictions.predicted[position])
        )
        pixels = image(index) if image else None
        mistakes.append(
            {
                "index": index,
                "true": true,
                "predicted": predicted,
                "confidence": float(predictions.confidence[position]),
                "grade": None if grades is None else float(grades[position]),
                "picture": None if pixels is None else thumbnail(pixels),
                "small": pixels is not None and max(pixels.shape[:2]) <= _SMALL,
            }
        )
    return mistakes


def _groups(values: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Nested settings by their first name; first those that are in no group."""
    single = [(name, value) for name, value in values.items() if not isinstance(value, Mapping)]
    groups = [("run", single)] if single else []
    for name, value in values.items():
        if isinstance(value, Mapping):
            groups.append((name, list(flatten(value))))
    return groups


def _numbers(row: Mapping[str, Any]) -> dict[str, int | float]:
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
