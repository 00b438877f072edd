# SPDX-License-Identifier: Apache-2.0
"""``fastresnet train``: one recipe, from the command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fastresnet.data import DatasetNotFoundError
from fastresnet.runs import Dataset, open_data, train_recipe
from fastresnet.train import RECIPES, ConfigError, Recipe, apply_overrides
from fastresnet.train.distributed import process_group
from fastresnet.train.precision import resolve_device


def run(arguments: argparse.Namespace) -> int:
    """Trains, evaluates, reports; returns the exit status."""
    console = Console(soft_wrap=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.resume and arguments.output is None:
        raise ConfigError("--resume: expected --output with the folder of the run, got none")
    overrides = list(arguments.overrides)
    if arguments.pretrained is not None:
        overrides.append(f"model.pretrained={arguments.pretrained}")
    recipe, dataset = _load(arguments.recipe, overrides, arguments.data, console)
    with process_group(resolve_device(recipe.device)) as world:
        if not world.writes:
            console = Console(quiet=True)
        if world.size > 1 and arguments.output is None:
            raise ConfigError("expected --output, the same for all processes, got none")
        folder = arguments.output or Path("runs", f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            train_recipe(
                recipe,
                dataset,
                folder=folder,
                resume=arguments.resume,
                console=console,
                world=world,
            )
        except KeyboardInterrupt:
            console.print(
                "interrupted; to go on where it was saved last, give the same command with "
                f"--output {folder} --resume",
                highlight=False,
            )
            return 130
    return 0


def _load(
    name: str, overrides: Sequence[str], root: Path | None, console: Console
) -> tuple[Recipe, Dataset]:
    """The recipe and its data set; the digits' recipe where Fashion-MNIST cannot be had."""
    recipe = apply_overrides(RECIPES[name](), overrides)
    try:
        return recipe, open_data(recipe, root)
    except DatasetNotFoundError as error:
        if recipe.data.dataset != "fashion-mnist":
            raise
        console.print(f"{error}; training on scikit-learn's real handwritten digits instead")
    recipe = apply_overrides(RECIPES["digits"](), overrides)
    return recipe, open_data(recipe, None)
