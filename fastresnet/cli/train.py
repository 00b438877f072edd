# SPDX-License-Identifier: Apache-2.0
"""``fastresnet train``: wires data, network and loop together as a recipe says."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from torch import nn

from fastresnet import models
from fastresnet.cli.info import environment
from fastresnet.data import (
    Augment,
    DatasetNotFoundError,
    ImageDataset,
    TensorLoader,
    load_digits,
    load_fashion_mnist,
)
from fastresnet.train import RECIPES, ConfigError, Recipe, apply_overrides
from fastresnet.train.config import to_dict
from fastresnet.train.loop import Trainer, to_device
from fastresnet.train.precision import resolve_amp, resolve_device
from fastresnet.train.report import (
    append_jsonl,
    plot_confusion,
    plot_curves,
    write_confusion,
    write_json,
)
from fastresnet.train.step_timing import StepTiming, format_timing, time_steps


def run(arguments: argparse.Namespace) -> int:
    """Trains, evaluates, reports; returns the exit status."""
    console = Console(soft_wrap=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.resume and arguments.output is None:
        raise ConfigError("--resume: expected --output with the folder of the run, got none")
    recipe, dataset = _load(arguments.recipe, arguments.overrides, arguments.data, console)
    folder = arguments.output or Path("runs", f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        train_recipe(recipe, dataset, folder=folder, resume=arguments.resume, console=console)
    except KeyboardInterrupt:
        console.print(
            "interrupted; to go on after the last finished epoch, give the same command with "
            f"--output {folder} --resume",
            highlight=False,
        )
        return 130
    return 0


def train_recipe(
    recipe: Recipe, dataset: ImageDataset, *, folder: Path, resume: bool, console: Console
) -> None:
    """Trains the recipe on the data set, tests the best weights, and writes the report."""
    begin = time.perf_counter()
    device = resolve_device(recipe.device)
    amp = resolve_amp(recipe.amp, device)
    console.print(
        f"{recipe.model.name} on {dataset.name} from {dataset.source}: "
        f"{len(dataset.train)} training and {len(dataset.test)} test images; {device.type}, "
        f"{'bf16 autocast' if amp else 'float32'}, {torch.get_num_threads()} threads",
        highlight=False,
    )
    train_set, val_set = dataset.train.split(recipe.data.validation, seed=recipe.seed)
    augment = Augment(
        size=recipe.data.image_size,
        resize=min(dataset.train.images.shape[1:3]),
        crop="random",
        padding=recipe.data.padding,
        hflip=recipe.data.flip,
        mean=recipe.data.mean,
        std=recipe.data.std,
    )
    train_loader, val_loader, test_loader = (
        TensorLoader(
            image_set,
            augment,
            batch_size=recipe.data.batch_size,
            training=training,
            seed=recipe.seed,
            drop_last=training,
        )
        for image_set, training in ((train_set, True), (val_set, False), (dataset.test, False))
    )
    torch.manual_seed(recipe.seed)
    model = _build_model(recipe.model.name, dataset).to(device)
    _prepare_folder(folder, recipe, resume=resume)  # after everything that bad settings stop
    trainer = Trainer(model, train_loader, val_loader, recipe, folder=folder, console=console)
    if resume:
        trainer.resume()
    history = trainer.fit()
    plot_curves(folder / "curves.png", history, title=f"{recipe.name}: {recipe.model.name}")

    test = trainer.test(test_loader)
    metrics = folder / "metrics.jsonl"
    append_jsonl(
        metrics,
        {
            "event": "test",
            "epoch": history.best.epoch,
            "loss": test.loss,
            "accuracy": test.accuracy,
        },
    )
    console.print(
        f"test accuracy {test.accuracy:.2%} on {test.images} images, with the weights of epoch "
        f"{history.best.epoch} (validation accuracy {history.best.val_accuracy:.2%})",
        highlight=False,
    )
    plot_confusion(
        folder / "confusion.png",
        test.confusion,
        dataset.classes,
        title=f"{recipe.name}: {test.accuracy:.2%} of {test.images:,} test images right",
    )
    write_confusion(folder, test.confusion, dataset.classes)

    timing = None
    if recipe.timed_steps:
        train_loader.set_epoch(0, image_size=history.rows[-1].image_size)
        images, labels = to_device(*next(iter(train_loader)), device)
        timing = time_steps(
            model,
            _torchvision_peer(recipe.model.name, dataset),
            images,
            labels,
            optim=recipe.optim,
            amp=amp,
            steps=recipe.timed_steps,
        )
        append_jsonl(metrics, {"event": "step_timing", **_timing_row(timing)})
        console.print(format_timing(timing, peer="torchvision"), highlight=False)
    write_json(
        folder / "summary.json",
        {
            "recipe": recipe.name,
            "dataset": dataset.name,
            "source": dataset.source,
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "best": asdict(history.best),
            "device": device.type,
            "amp": "bf16" if amp else "none",
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - begin,
            "step_timing": timing and _timing_row(timing),
        },
    )
    console.print(f"written to {folder}", highlight=False)


def _load(
    name: str, overrides: Sequence[str], root: Path | None, console: Console
) -> tuple[Recipe, ImageDataset]:
    """The recipe and its data set; the digits' recipe where Fashion-MNIST cannot be had."""
    recipe = apply_overrides(RECIPES[name](), overrides)
    match recipe.data.dataset:
        case "digits":
            return recipe, load_digits()
        case "fashion-mnist":
            pass
        case other:
            raise ConfigError(f"data.dataset: expected digits or fashion-mnist, got {other!r}")
    try:
        return recipe, load_fashion_mnist(root)
    except DatasetNotFoundError as error:
        console.print(f"{error}; training on scikit-learn's real handwritten digits instead")
        return apply_overrides(RECIPES["digits"](), overrides), load_digits()


def _prepare_folder(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Makes the run's folder with its configuration, or checks that it holds this very run."""
    config = folder / "config.json"
    resolved = json.loads(json.dumps(to_dict(recipe)))
    if resume:
        if not (folder / "last.pt").is_file():
            raise ConfigError(
                f"--resume: expected a run with a finished epoch in {folder}, got none"
            )
        if json.loads(config.read_text()) != resolved:
            raise ConfigError(
                f"--resume: expected the recipe and settings of {config}, got other ones"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output: expected a new or empty folder, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(config, resolved)
    write_json(folder / "environment.json", environment())


def _build_model(name: str, dataset: ImageDataset) -> nn.Module:
    known = [factory for factory in models.__all__ if factory.startswith("cifar_")]
    if name not in known:
        raise ConfigError(f"model.name: expected one of {', '.join(known)}, got {name!r}")
    return getattr(models, name)(num_classes=len(dataset.classes), in_channels=dataset.channels)


def _torchvision_peer(name: str, dataset: ImageDataset) -> nn.Module:
    """torchvision's network of the same shape: its ResNet with the stem for small images."""
    peer = torchvision.models.get_model(
        name.removeprefix("cifar_"), weights=None, num_classes=len(dataset.classes)
    )
    peer.conv1 = nn.Conv2d(dataset.channels, 64, kernel_size=3, padding=1, bias=False)
    peer.maxpool = nn.Identity()
    return peer


def _timing_row(timing: StepTiming) -> dict[str, object]:
    return {**asdict(timing), "speedup": timing.speedup, "outputs_agree": timing.outputs_agree}
