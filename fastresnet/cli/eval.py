# SPDX-License-Identifier: Apache-2.0
"""``fastresnet eval``: a trained network on a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open

from fastresnet.runs import (
    build_loader,
    build_network,
    build_objective,
    check_two_eyes,
    format_figures,
    open_data,
    other_eye,
    shown,
    split,
)
from fastresnet.train import ConfigError, Recipe, apply_overrides
from fastresnet.train.checkpoint import CheckpointError, load_weights
from fastresnet.train.confusion import Confusion, write_confusion
from fastresnet.train.distributed import World
from fastresnet.train.evaluate import evaluate, regraded
from fastresnet.train.overrides import from_dict
from fastresnet.train.plots import confusion_figure, save_png
from fastresnet.train.precision import resolve_amp, resolve_device
from fastresnet.train.predictions import write_predictions
from fastresnet.train.run_directory import write_json
from fastresnet.train.two_eyes import Fusion


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and prints; returns the exit status."""
    console = Console(soft_wrap=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    trained = _read(arguments.run)
    recipe = apply_overrides(trained.recipe, arguments.overrides)
    dataset = open_data(recipe, arguments.data)
    part = getattr(split(recipe, dataset), arguments.part)
    device = resolve_device(recipe.device)
    world = World()
    loader = build_loader(recipe, part, training=False, device=device, world=world)
    objective = build_objective(recipe, dataset, dataset.train.labels)
    if recipe.evaluation.two_eyes:
        check_two_eyes(recipe, part)
        if trained.fusion is None:
            raise ConfigError(
                f"evaluation.two_eyes: expected a run that was tested with it, got {arguments.run}"
            )
    model = build_network(recipe, dataset, outputs=objective.outputs).to(device)
    load_weights(trained.weights, model)
    model.to(memory_format=torch.channels_last)
    loader.set_epoch(0, image_size=trained.image_size)
    evaluation = evaluate(
        model,
        loader,
        objective,
        amp=resolve_amp(recipe.amp, device),
        console=console,
        title=arguments.part,
        flips=recipe.evaluation.flips,
        thresholds=trained.thresholds,
    )
    if recipe.evaluation.two_eyes:
        evaluation = trained.fusion.applied(evaluation, other_eye(part, loader))
        evaluation = regraded(evaluation, objective, trained.thresholds)
    ordinal = recipe.evaluation.ordinal
    line = format_figures(evaluation, ordinal=ordinal).removeprefix("test ")
    console.print(f"{arguments.part} part of {dataset.source}: {line}", highlight=False)
    figures = evaluation.figures(ordinal=ordinal, referable=recipe.evaluation.referable)
    for name, recall in zip(dataset.classes, figures["recall"], strict=True):
        text = "no images" if recall is None else f"{recall:.2%}"
        console.print(f"  recall of {name}: {text}", highlight=False)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_confusion(arguments.output, evaluation.confusion, dataset.classes)
        figure = confusion_figure(Confusion(evaluation.confusion.numpy(), dataset.classes))
        title = f"{recipe.name}: {evaluation.images:,} {arguments.part} images"
        save_png(figure, arguments.output / "confusion.png", title=title)
        write_predictions(arguments.output / "predictions.npz", evaluation, shown(loader, part))
        write_json(arguments.output / "evaluation.json", {"source": dataset.source, **figures})
        console.print(f"written to {arguments.output}", highlight=False)
    return 0


class Trained(NamedTuple):
    """What a run left."""

    weights: Path
    recipe: Recipe
    image_size: int | None  # at which the weights were chosen
    thresholds: torch.Tensor | None  # of a regression
    fusion: Fusion | None  # of the grades of a patient's eyes


def _read(path: Path) -> Trained:
    weights = path / "best.safetensors" if path.is_dir() else path
    if not weights.is_file():
        raise ConfigError(f"expected the folder of a run, or a file of its weights, got {path}")
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{weights}: expected a safetensors file, got: {error}") from error
    if "run" not in metadata:
        raise CheckpointError(f"{weights}: expected weights that name their recipe, got none")
    run = json.loads(metadata["run"])
    recipe = from_dict(run["recipe"])
    summary = _summary(weights.parent)
    thresholds, fusion = summary.get("thresholds"), summary.get("fusion")
    return Trained(
        weights,
        recipe,
        run["image_size"],
        None if thresholds is None else torch.tensor(thresholds),
        None if fusion is None else Fusion(**fusion),
    )


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}
