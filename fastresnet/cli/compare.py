# SPDX-License-Identifier: Apache-2.0
"""``fastresnet compare``: sets runs beside each other, those it is given or those it trains."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastresnet.cli import build_parser, train
from fastresnet.train import RECIPES, ConfigError, apply_overrides
from fastresnet.train.compare import Comparison, compare_runs, format_spread, write_comparison
from fastresnet.train.run_directory import (
    failure,
    is_finished,
    is_resumable,
    read_run,
    write_failure,
    write_json,
)
from fastresnet.train.sweep import Variant, variants

_PLAN = "plan.json"
_INTERRUPTED = 130


def run(arguments: argparse.Namespace) -> int:
    """Trains what is to be trained, compares, and says where it is written."""
    console = Console(soft_wrap=True)
    if arguments.vary or arguments.seeds is not None:
        output = arguments.output or Path("runs", f"compare-{arguments.runs[0]}")
        planned = _plan(arguments, output)
        folders = [output / variant.folder for variant in planned]
        for number, (variant, folder) in enumerate(zip(planned, folders, strict=True), start=1):
            state = "finished before" if is_finished(folder) else failure(folder) or ""
            console.print(
                f"run {number}/{len(folders)}: {' '.join(variant.overrides)}  {state}",
                style="bold",
                highlight=False,
                markup=False,
            )
            if not state and _train(arguments, variant, folder) == _INTERRUPTED:
                console.print("to go on, give the same command again", highlight=False)
                return _INTERRUPTED
    else:
        for option in ("overrides", "data", "threads"):
            if getattr(arguments, option):
                name = "--set" if option == "overrides" else f"--{option}"
                raise ConfigError(f"{name}: expected --vary or --seeds with it, got neither")
        output = arguments.output or Path("runs", f"compare-{time.strftime('%Y%m%d-%H%M%S')}")
        folders = [Path(name) for name in arguments.runs]
    comparison = compare_runs([read_run(folder) for folder in folders])
    page = write_comparison(output, comparison)
    console.print(_table(comparison))
    console.print(f"written to {output}; {page} shows it all", highlight=False)
    return 0


def _plan(arguments: argparse.Namespace, output: Path) -> list[Variant]:
    """The runs to train; all of their settings are checked, and the folder, before the first."""
    if len(arguments.runs) != 1 or arguments.runs[0] not in RECIPES:
        raise ConfigError(
            f"--vary, --seeds: expected one recipe of {', '.join(RECIPES)}, "
            f"got {', '.join(arguments.runs)}"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ConfigError(f"compare: expected one process to train in, got {processes}")
    recipe = apply_overrides(RECIPES[arguments.runs[0]](), arguments.overrides)
    seeds = range(recipe.seed, recipe.seed + (arguments.seeds or 1))
    planned = variants(arguments.vary, seeds=seeds)
    for variant in planned:
        apply_overrides(recipe, variant.overrides)
    plan = {
        "recipe": arguments.runs[0],
        "set": arguments.overrides,
        "data": arguments.data and str(arguments.data),
    }
    path = output / _PLAN
    if path.is_file():
        # More values and seeds may be added to a comparison; what all runs share may not change.
        if json.loads(path.read_text()) != plan:
            raise ConfigError(
                f"--output: expected the recipe, --set and --data of {path}, got other ones"
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: expected a new or empty folder, got {output}")
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)
    return planned


def _train(arguments: argparse.Namespace, variant: Variant, folder: Path) -> int:
    """Trains one run as ``fastresnet train`` does, or goes on with it; returns its exit status."""
    command = ["train", arguments.runs[0], "--output", str(folder)]
    for change in (*arguments.overrides, *variant.overrides):
        command += ["--set", change]
    if arguments.data:
        command += ["--data", str(arguments.data)]
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    if is_resumable(folder):
        command += ["--resume"]
    elif folder.exists():
        shutil.rmtree(folder)  # stopped before it was a run
    try:
        return train.run(build_parser().parse_args(command))
    except FloatingPointError as error:
        # A comparison is to show that a setting diverges, not to end there.
        write_failure(folder, error)
        return 1


def _table(comparison: Comparison) -> Table:
    columns = {"best validation accuracy": "right", "test accuracy": "right"}
    if comparison.has_kappa:
        columns["test kappa"] = "right"
    table = Table("run", "runs", box=None)
    for name, side in columns.items():
        table.add_column(name, justify=side)
    for group in comparison.groups:
        cells = [
            format_spread(group.best_accuracy, share=True),
            format_spread(group.test("accuracy"), share=True),
        ]
        if comparison.has_kappa:
            cells.append(format_spread(group.test("kappa"), share=False))
        note = f" ({group.note})" if group.note else ""
        table.add_row(escape(group.label + note), str(len(group.runs)), *cells)
    return table
