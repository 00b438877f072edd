# SPDX-License-Identifier: Apache-2.0
"""One recipe on one data set: training, the test of the best weights, and the report."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastresnet import models
from fastresnet.data import ImageError, Loader
from fastresnet.environment import environment
from fastresnet.nn import sync_batch_norm
from fastresnet.runs.wiring import (
    Dataset,
    ImagePart,
    build_loader,
    build_network,
    build_objective,
    check_two_eyes,
    other_eye,
    pixels,
    shown,
    split,
)
from fastresnet.train import ConfigError, Recipe
from fastresnet.train.batches import to_device
from fastresnet.train.config import to_dict
from fastresnet.train.confusion import write_confusion
from fastresnet.train.distributed import World
from fastresnet.train.graph import check_recordable
from fastresnet.train.journal import Journal
from fastresnet.train.loop import TestResult, Trainer
from fastresnet.train.metrics import Evaluation
from fastresnet.train.precision import amp_name, resolve_amp, resolve_device
from fastresnet.train.predictions import write_predictions
from fastresnet.train.report import write_report
from fastresnet.train.revision import source_revision
from fastresnet.train.run_directory import write_json
from fastresnet.train.step_timing import StepTiming, format_timing, time_steps
from fastresnet.train.two_eyes import check_pairs, other_eyes


def train_recipe(
    recipe: Recipe,
    dataset: Dataset,
    *,
    folder: Path,
    resume: bool = False,
    console: Console | None = None,
    world: World | None = None,
) -> TestResult:
    """Trains the recipe on the data set, tests the best weights, and writes the report.

    Args:
        recipe: the configuration; its ``data.dataset`` is not looked at again.
        dataset: the images, as :func:`open_data` or any loader of :mod:`fastresnet.data` gives
            them.
        folder: a new or empty folder for the run's files, or with ``resume`` that of the run;
            ``report.html`` in it shows everything.
        resume: go on where the run was saved last.
        console: where progress, the line of each epoch and the test's go (default: the terminal).
        world: the processes that train together, as
            :func:`fastresnet.train.distributed.process_group` gives them.

    Returns:
        What the best weights do on the test images.

    Raises:
        ConfigError, DatasetError: the recipe does not fit the data, or the folder the run.
        FloatingPointError: the loss is no longer finite.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the state was saved.
    """
    begin = time.perf_counter()
    world = world or World()
    console = console or Console(soft_wrap=True, quiet=not world.writes)
    torch.use_deterministic_algorithms(recipe.deterministic)
    device = resolve_device(recipe.device)
    amp = resolve_amp(recipe.amp, device)
    if recipe.cuda_graph:
        check_recordable(device, world)
    parts = split(recipe, dataset)
    train_loader, val_loader, test_loader = (
        build_loader(recipe, part, training=training, device=device, world=world)
        for part, training in ((parts.train, True), (parts.validation, False), (parts.test, False))
    )
    objective = build_objective(recipe, dataset, parts.train.labels)
    if recipe.evaluation.two_eyes:
        check_two_eyes(recipe, parts.validation, parts.test)
        check_pairs(other_eyes(parts.validation.groups))
    model = build_network(recipe, dataset, outputs=objective.outputs).to(device)
    if world.size > 1 and recipe.sync_batch_norm:
        sync_batch_norm(model)
    console.print(
        f"{recipe.model.name} on {dataset.name} from {dataset.source}: {len(parts.train)} "
        f"training, {len(parts.validation)} validation and {len(parts.test)} test images "
        f"({train_loader.description}); {device.type}, "
        f"{'float32' if amp is None else f'{amp_name(amp)} autocast'}, "
        f"{torch.get_num_threads()} threads"
        + (f", {world.size} processes" if world.size > 1 else ""),
        highlight=False,
    )
    # After everything that bad settings stop.
    if world.writes:
        _prepare_folder(folder, recipe, resume=resume)
    world.barrier()
    trainer = Trainer(
        model,
        train_loader,
        val_loader,
        recipe,
        objective,
        folder=folder,
        console=console,
        world=world,
    )
    if resume:
        trainer.resume()
    fitting = time.perf_counter()
    history = trainer.fit()
    fitted = time.perf_counter() - fitting

    def others(loader: Loader) -> Tensor:
        return other_eye(parts.validation if loader is val_loader else parts.test, loader)

    test = trainer.test(test_loader, others=others)
    if not world.writes:
        return test
    evaluation = test.evaluation
    figures = evaluation.figures(
        ordinal=recipe.evaluation.ordinal, referable=recipe.evaluation.referable
    )
    journal = Journal(folder, tensorboard=False, console=console)
    journal.write("test", epoch=history.best.epoch, **figures)
    console.print(
        f"{format_figures(evaluation, ordinal=recipe.evaluation.ordinal)}, with the weights of "
        f"epoch {history.best.epoch} (validation accuracy {history.best.val_accuracy:.2%})",
        highlight=False,
    )
    write_predictions(folder / "predictions.npz", evaluation, shown(test_loader, parts.test))
    write_confusion(folder, evaluation.confusion, dataset.classes)

    timing = None
    if recipe.timed_steps and world.size == 1:
        train_loader.set_epoch(0, image_size=history.rows[-1].image_size)
        images, labels = to_device(*next(iter(train_loader)), device)
        timing = time_steps(
            model,
            models.revert(copy.deepcopy(model)),
            images,
            labels,
            optim=recipe.optim,
            amp=amp,
            steps=recipe.timed_steps,
            loss=objective.loss,
        )
        journal.write("step_timing", **_timing_row(timing))
        console.print(format_timing(timing, peer="torchvision"), highlight=False)
    write_json(
        folder / "summary.json",
        {
            "recipe": recipe.name,
            "dataset": dataset.name,
            "source": dataset.source,
            "classes": list(dataset.classes),
            "test_accuracy": evaluation.accuracy,
            "test_loss": evaluation.loss,
            "test": figures,
            "thresholds": None if test.thresholds is None else test.thresholds.tolist(),
            "fusion": test.fusion and test.fusion._asdict(),
            "best": asdict(history.best),
            "device": device.type,
            "amp": amp_name(amp),
            "threads": torch.get_num_threads(),
            "processes": world.size,
            "loader": train_loader.description,
            # The epochs by their own clock: other processes may have trained them.
            "seconds": time.perf_counter() - begin - fitted + sum(r.seconds for r in history.rows),
            "step_timing": timing and _timing_row(timing),
        },
    )
    page = write_report(folder, image=lambda index: _picture(parts.test, index))
    console.print(f"written to {folder}; {page} shows it all", highlight=False)
    return test


def _picture(part: ImagePart, index: int) -> np.ndarray | None:
    """An image to look at; None of a file that ``data.on_error`` has put a placeholder for."""
    try:
        return pixels(part, index)
    except ImageError:
        return None


def format_figures(evaluation: Evaluation, *, ordinal: bool) -> str:
    """The line that a test prints, beside what calling everything one class would give."""
    line = (
        f"test accuracy {evaluation.accuracy:.2%} on {evaluation.images} images "
        f"({evaluation.majority:.2%} are of the most frequent class)"
    )
    if not ordinal:
        return line
    kappa = "undefined" if evaluation.kappa is None else f"{evaluation.kappa:.4f}"
    return f"{line}, quadratic weighted kappa {kappa}"


def _prepare_folder(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Makes the run's folder with its configuration, or checks that it holds this very run."""
    config = folder / "config.json"
    resolved = json.loads(json.dumps(to_dict(recipe)))
    if resume:
        if not config.is_file():
            raise ConfigError(f"--resume: expected the folder of a run, got {folder}")
        if json.loads(config.read_text()) != resolved:
            raise ConfigError(
                f"--resume: expected the recipe and settings of {config}, got other ones"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output: expected a new or empty folder, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", {**environment(), "source": _source()})
    write_json(config, resolved)  # the last: a folder with it is a run's


def _source() -> dict[str, str]:
    return {"revision": source_revision() or "unknown: not run from a clone"}


def _timing_row(timing: StepTiming) -> dict[str, object]:
    return {**asdict(timing), "speedup": timing.speedup, "outputs_agree": timing.outputs_agree}
