# SPDX-License-Identifier: Apache-2.0
"""The training loop and the evaluation pass.

It takes a model and loaders as arguments and knows neither what the model is made of nor where
the images come from: a loader is anything that yields (images, labels) and has a length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fastresnet.train.checkpoint import (
    CheckpointError,
    load_state,
    load_weights,
    save_state,
    save_weights,
)
from fastresnet.train.config import Recipe
from fastresnet.train.metrics import Evaluation, RunningMetrics
from fastresnet.train.optim import build_optimizer, build_schedule
from fastresnet.train.precision import autocast, resolve_amp
from fastresnet.train.progress import EpochProgress
from fastresnet.train.report import append_jsonl, write_jsonl


class Loader(Protocol):
    """Batches of images, float32 [B, C, H, W], and labels, int64 [B]."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def set_epoch(self, epoch: int, *, image_size: int | None = None) -> None: ...


@dataclass(frozen=True)
class EpochRow:
    """One epoch: a printed line and a row of ``metrics.jsonl``. Epochs count from 1."""

    epoch: int
    image_size: int | None
    learning_rate: float  # of the epoch's last step
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class History:
    """The epochs of a run and which of them was best on the validation images."""

    rows: tuple[EpochRow, ...]

    @property
    def best(self) -> EpochRow:
        """The epoch of the highest validation accuracy, and of the lowest loss among equals."""
        return max(self.rows, key=lambda row: (row.val_accuracy, -row.val_loss))


class Trainer:
    """Trains one model as one recipe says, and leaves its files in one folder.

    ``metrics.jsonl`` gets a row an epoch, ``best.safetensors`` the weights of the best epoch so
    far, ``last.pt`` what :meth:`resume` needs.

    Args:
        model: the network; trained in place, on the device where it is.
        train_loader: the training batches.
        val_loader: the validation batches.
        recipe: the configuration.
        folder: an existing folder for the files.
        console: where progress and the epochs' lines go.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Loader,
        val_loader: Loader,
        recipe: Recipe,
        *,
        folder: Path,
        console: Console,
    ) -> None:
        self.model = model.to(memory_format=torch.channels_last)
        self._train_loader = train_loader
        self._val_loader = val_loader
        self._recipe = recipe
        self._folder = folder
        self._console = console
        self._device = next(model.parameters()).device
        self._amp = resolve_amp(recipe.amp, self._device)
        self._optimizer = build_optimizer(model, recipe.optim)
        self._schedule = build_schedule(
            self._optimizer,
            recipe.schedule,
            total_steps=recipe.schedule.epochs * len(train_loader),
        )
        self._rows: list[EpochRow] = []

    @property
    def best_weights(self) -> Path:
        """The file with the weights of the best epoch."""
        return self._folder / "best.safetensors"

    @property
    def _last_state(self) -> Path:
        return self._folder / "last.pt"

    @property
    def _metrics(self) -> Path:
        return self._folder / "metrics.jsonl"

    def fit(self) -> History:
        """Trains all epochs that are left.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        for epoch in range(len(self._rows), self._recipe.schedule.epochs):
            row = self._run_epoch(epoch)
            self._rows.append(row)
            self._console.print(format_epoch(row, self._recipe.schedule.epochs), highlight=False)
            # The best weights first: a kill between the two files repeats the epoch on resume,
            # which writes them again, bit for bit.
            if History(tuple(self._rows)).best is row:
                save_weights(self.best_weights, self.model, metadata={"epoch": str(row.epoch)})
            save_state(self._last_state, self._state())
            append_jsonl(self._metrics, {"event": "epoch", **vars(row)})
        return History(tuple(self._rows))

    def resume(self) -> None:
        """Takes up a run of the same recipe after the last epoch that it finished.

        Raises:
            CheckpointError: the state is damaged or of another recipe or model.
        """
        state = load_state(self._last_state)
        total_steps = self._recipe.schedule.epochs * len(self._train_loader)
        if state["total_steps"] != total_steps:
            raise CheckpointError(
                f"{self._last_state}: expected a run of {total_steps} steps, "
                f"got one of {state['total_steps']}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self._last_state}: expected the state of this model, got: {error}"
            ) from error
        self._schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        self._rows = [EpochRow(**row) for row in state["rows"]]
        # The two files are not written in one instant: the state is the one that counts.
        write_jsonl(self._metrics, [{"event": "epoch", **vars(row)} for row in self._rows])

    def test(self, loader: Loader) -> Evaluation:
        """Reloads the best weights and evaluates them, at the image size of their epoch."""
        load_weights(self.best_weights, self.model)
        best = History(tuple(self._rows)).best
        loader.set_epoch(0, image_size=best.image_size)
        return self._evaluate(loader, "test")

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "rows": [vars(row) for row in self._rows],
            "total_steps": self._recipe.schedule.epochs * len(self._train_loader),
        }

    def _run_epoch(self, epoch: int) -> EpochRow:
        begin = time.perf_counter()
        schedule = self._recipe.schedule
        image_size = schedule.image_size(epoch)
        self._train_loader.set_epoch(epoch, image_size=image_size)
        self._val_loader.set_epoch(epoch, image_size=image_size)

        self.model.train()
        metrics = RunningMetrics(self._device)
        title = f"epoch {epoch + 1}/{schedule.epochs}"
        with EpochProgress(self._console, f"{title} train", len(self._train_loader)) as progress:
            for images, labels in self._train_loader:
                learning_rate = self._optimizer.param_groups[0]["lr"]
                self._step(images, labels, metrics)
                if progress.advance(len(labels)):
                    progress.show(f"loss {metrics.loss():.4f}  acc {metrics.accuracy():.2%}")
            train_loss, train_accuracy = metrics.loss(), metrics.accuracy()
            speed = progress.images_per_second

        validation = self._evaluate(self._val_loader, f"{title} val")
        return EpochRow(
            epoch=epoch + 1,
            image_size=image_size,
            learning_rate=learning_rate,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            val_loss=validation.loss,
            val_accuracy=validation.accuracy,
            images_per_second=speed,
            seconds=time.perf_counter() - begin,
        )

    def _step(self, images: Tensor, labels: Tensor, metrics: RunningMetrics) -> None:
        images, labels = to_device(images, labels, self._device)
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._amp, self._device):
            logits = self.model(images)
            loss = F.cross_entropy(
                logits.float(), labels, label_smoothing=self._recipe.label_smoothing
            )
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        metrics.update(loss, logits, labels)

    def _evaluate(self, loader: Loader, title: str) -> Evaluation:
        return evaluate(
            self.model,
            loader,
            label_smoothing=self._recipe.label_smoothing,
            amp=self._amp,
            console=self._console,
            title=title,
        )


def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    label_smoothing: float,
    amp: torch.dtype | None,
    console: Console,
    title: str,
) -> Evaluation:
    """Predicts every batch of the loader in eval mode.

    The loss is smoothed as in training, so that the two curves can be compared.
    """
    device = next(model.parameters()).device
    model.eval()
    metrics, confusion = RunningMetrics(device), None
    with torch.inference_mode(), EpochProgress(console, title, len(loader)) as progress:
        for images, labels in loader:
            images, labels = to_device(images, labels, device)
            with autocast(amp, device):
                logits = model(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
            metrics.update(loss, logits, labels)
            counts = multiclass_confusion_matrix(logits, labels, num_classes=logits.shape[1])
            confusion = counts if confusion is None else confusion + counts
            if progress.advance(len(labels)):
                progress.show(f"acc {metrics.accuracy():.2%}")
    if confusion is None:
        raise ValueError("expected a loader with at least one batch, got none")
    return Evaluation(loss=metrics.loss(), confusion=confusion.cpu())


def to_device(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Moves a batch to the device, the images in channels_last."""
    return (
        images.to(device, non_blocking=True, memory_format=torch.channels_last),
        labels.to(device, non_blocking=True),
    )


def format_epoch(row: EpochRow, epochs: int) -> str:
    """The line that an epoch prints."""
    return (
        f"epoch {row.epoch}/{epochs}  lr {row.learning_rate:.4g}  "
        f"train loss {row.train_loss:.4f} acc {row.train_accuracy:.2%}  "
        f"val loss {row.val_loss:.4f} acc {row.val_accuracy:.2%}  "
        f"{row.images_per_second:.0f} images/s  {row.seconds:.0f} s"
    )
