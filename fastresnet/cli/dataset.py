# SPDX-License-Identifier: Apache-2.0
"""``fastresnet dataset``: checks, describes or prepares a data set in a folder."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from fastresnet.data.check import CheckReport, check_dataset
from fastresnet.data.datasets import load_dataset, open_dataset
from fastresnet.data.datasets.errors import Problem
from fastresnet.data.parallel import Progress
from fastresnet.data.prepare import PrepareSettings, prepare_dataset
from fastresnet.data.stats import DatasetStats, dataset_stats

_SHOWN_NOTES = 20  # of each kind
_SHOWN_SIZES = 10


def run(arguments: argparse.Namespace) -> int:
    """Runs the action; returns the exit status."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    return {"check": _check, "stats": _stats, "prepare": _prepare}[arguments.action](
        arguments, console
    )


def _check(arguments: argparse.Namespace, console: Console) -> int:
    with _progress("checking") as progress:
        report = check_dataset(
            Path(arguments.data),
            arguments.layout,
            full=arguments.full,
            threads=arguments.threads,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_check(report, console)
    return 1 if report.errors else 0


def _print_check(report: CheckReport, console: Console) -> None:
    if report.errors:
        console.print("errors")
        for problem in report.errors:
            console.print(f"  {problem}")
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in report.notes:
        by_kind[problem.kind].append(problem)
    for kind, problems in by_kind.items():
        console.print(f"notes: {kind}")
        for problem in problems[:_SHOWN_NOTES]:
            console.print(f"  {problem}")
        if len(problems) > _SHOWN_NOTES:
            console.print(f"  and {len(problems) - _SHOWN_NOTES} more; --json lists them")
    images = ", ".join(
        f"{count:,} {part.replace('train', 'training')}" for part, count in report.images.items()
    )
    files = f", {report.files:,} files" if report.files else ""
    console.print(
        f"{report.folder} ({report.layout} layout): {images or 'no'} images{files}: "
        f"{_counted(len(report.errors), 'error')}, {_counted(len(report.notes), 'note')}, "
        f"{report.seconds:.1f} s"
    )


def _stats(arguments: argparse.Namespace, console: Console) -> int:
    # Not split: the figures are those of the data set as it lies there.
    if arguments.layout is None and not Path(arguments.data).exists():
        dataset = load_dataset(arguments.data)
    else:
        dataset = open_dataset(Path(arguments.data), arguments.layout, test_share=0)
    with _progress("looking at images") as progress:
        stats = dataset_stats(
            dataset,
            sample=arguments.sample,
            seed=arguments.seed,
            threads=arguments.threads,
            progress=progress,
        )
    if arguments.plot is not None:
        from fastresnet.data.stats_figure import plot_stats

        plot_stats(arguments.plot, stats)
    if arguments.json:
        print(json.dumps(stats.to_dict(), indent=2))
    else:
        _print_stats(stats, console)
        if arguments.plot is not None:
            console.print(f"drawn to {arguments.plot}")
    return 0


def _print_stats(stats: DatasetStats, console: Console) -> None:
    console.print(f"{stats.name} from {stats.source}")
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for part in stats.counts:
        table.add_column(part, justify="right")
        table.add_column("share", justify="right")
    table.add_column("weight", justify="right")
    for number, (name, weight) in enumerate(zip(stats.classes, stats.class_weights, strict=True)):
        cells = [name]
        for counts in stats.counts.values():
            cells += [f"{counts[number]:,}", f"{counts[number] / sum(counts):.2%}"]
        table.add_row(*cells, f"{weight:.4f}")
    cells = ["all"]
    for counts in stats.counts.values():
        cells += [f"{sum(counts):,}", ""]
    table.add_row(*cells, "")
    console.print(table)
    sizes = [
        f"{images:,} of {width}x{height}"
        for (width, height), images in list(stats.sizes.items())[:_SHOWN_SIZES]
    ]
    if len(stats.sizes) > _SHOWN_SIZES:
        sizes.append(f"{len(stats.sizes) - _SHOWN_SIZES} other sizes")
    console.print(f"sizes: {', '.join(sizes)}")
    for name, values in (("mean", stats.mean), ("std", stats.std)):
        console.print(f"{name}: ({', '.join(f'{value:.4f}' for value in values)})")
    console.print(f"mean and std of {stats.sample:,} training images")


def _prepare(arguments: argparse.Namespace, console: Console) -> int:
    with _progress("preparing") as progress:
        report = prepare_dataset(
            Path(arguments.data),
            arguments.output,
            PrepareSettings(
                size=arguments.size,
                headroom=arguments.headroom,
                crop_border=arguments.crop_border,
                square=arguments.square,
                local_average=arguments.local_average,
            ),
            layout=arguments.layout,
            on_error=arguments.on_error,
            threads=arguments.threads,
            progress=progress,
        )
    if report.skipped:
        console.print("left out")
        for problem in report.skipped:
            console.print(f"  {problem}")
    console.print(
        f"{arguments.output}: {report.images:,} images, {report.made:,} made now, "
        f"{len(report.skipped):,} left out, {report.seconds:.1f} s"
    )
    return 0


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextmanager
def _progress(title: str) -> Iterator[Progress | None]:
    """A bar on standard error where that is a terminal; None elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
