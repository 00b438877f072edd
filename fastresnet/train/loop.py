# SPDX-License-Identifier: Apache-2.0
"""The training loop.

It takes a model and loaders as arguments and knows neither what the model is made of nor where
the images come from.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastresnet.train.batches import Loader, build_mix, to_device
from fastresnet.train.checkpoint import (
    CheckpointError,
    load_state,
    load_weights,
    save_state,
    save_weights,
)
from fastresnet.train.config import Recipe, to_dict
from fastresnet.train.distributed import World
from fastresnet.train.evaluate import evaluate, regraded, tune_thresholds
from fastresnet.train.graph import CapturedBackward, CudaGraphs, Graphs, check_recordable
from fastresnet.train.interruption import Interruption
from fastresnet.train.journal import Journal
from fastresnet.train.metrics import Evaluation, RunningMetrics
from fastresnet.train.objective import Objective
from fastresnet.train.optim import build_optimizer, schedule_factor, set_learning_rate
from fastresnet.train.precision import autocast, resolve_amp
from fastresnet.train.progress import EpochProgress, speed
from fastresnet.train.randomness import seed_step
from fastresnet.train.two_eyes import Fusion, fit_fusion

Selection = Literal["accuracy", "kappa", "loss"]


@dataclass(frozen=True)
class EpochRow:
    """One epoch: a printed line and a row of ``metrics.jsonl``. Epochs count from 1.

    Kappa and AUC are None where labels are no grades, or where they are not defined.
    """

    epoch: int
    image_size: int | None
    learning_rate: float  # of the epoch's last step
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float  # of training, all processes together
    seconds: float
    val_kappa: float | None = None
    val_auc: float | None = None
    data_seconds: float = 0.0  # of training, waiting for data


@dataclass(frozen=True)
class History:
    """The epochs of a run and which of them was best on the validation images."""

    rows: tuple[EpochRow, ...]
    select: Selection = "accuracy"

    @property
    def best(self) -> EpochRow:
        """The epoch of the highest validation accuracy or kappa, and of the lowest loss among
        equals; or of the lowest loss."""
        match self.select:
            case "loss":
                return min(self.rows, key=lambda row: row.val_loss)
            case "kappa":
                return max(self.rows, key=lambda row: (_or_lowest(row.val_kappa), -row.val_loss))
        return max(self.rows, key=lambda row: (row.val_accuracy, -row.val_loss))


def _or_lowest(value: float | None) -> float:
    return -float("inf") if value is None else value


@dataclass(frozen=True)
class TestResult:
    """What the best weights do on the test images; ``thresholds`` are those of a regression,
    ``fusion`` is how the grades of a patient's eyes were added up."""

    evaluation: Evaluation
    thresholds: Tensor | None
    fusion: Fusion | None


class Trainer:
    """Trains one model as one recipe says, and leaves its files in one folder.

    ``metrics.jsonl`` and ``metrics.csv`` get a row an epoch, ``best.safetensors`` the weights of
    the best epoch so far, ``last.pt`` what :meth:`resume` needs.

    Args:
        model: the network; trained in place, on the device where it is.
        train_loader: the training batches, this process's share of them.
        val_loader: the validation batches, this process's share of them.
        recipe: the configuration.
        objective: the loss, and what the model's outputs mean.
        folder: an existing folder for the files.
        console: where progress and the epochs' lines go.
        world: the processes that train together, each with a copy of the model.
        graphs: what records a step where ``recipe.cuda_graph`` asks for it; default: CUDA.

    Raises:
        ConfigError: ``recipe.cuda_graph`` without a GPU, or in several processes.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Loader,
        val_loader: Loader,
        recipe: Recipe,
        objective: Objective,
        *,
        folder: Path,
        console: Console,
        world: World | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.model = model.to(memory_format=torch.channels_last)
        self.interruption = Interruption()
        self._train_loader = train_loader
        self._val_loader = val_loader
        self._recipe = recipe
        self._objective = objective
        self._folder = folder
        self._world = world or World()
        if recipe.cuda_graph and graphs is None:
            check_recordable(next(model.parameters()).device, self._world)
        self._console = console if self._world.writes else Console(quiet=True)
        self._device = next(model.parameters()).device
        self._amp = resolve_amp(recipe.amp, self._device)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._amp is torch.float16)
        self._optimizer = build_optimizer(model, recipe.optim)
        self._replica = _replicate(model, recipe, self._world)
        self._average = None
        if recipe.ema is not None:
            self._average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True
            )
        self._captured = None
        if recipe.cuda_graph:
            self._captured = CapturedBackward(
                self._backward, model, graphs or CudaGraphs(self._device)
            )
        self._mix = build_mix(recipe.mix, classes=objective.classes)
        self._journal = Journal(folder, tensorboard=recipe.tensorboard, console=self._console)
        # The state of the epoch in progress, and the finished ones.
        self._rows: list[EpochRow] = []
        self._metrics = RunningMetrics(self._device)
        self._seconds = {"total": 0.0, "train": 0.0, "data": 0.0}
        self._loader_state: dict[str, int] | None = None
        self._saved = time.monotonic()

    @property
    def best_weights(self) -> Path:
        """The file with the weights of the best epoch."""
        return self._folder / "best.safetensors"

    @property
    def history(self) -> History:
        """The finished epochs."""
        return History(tuple(self._rows), self._recipe.evaluation.select)

    @property
    def _judged(self) -> nn.Module:
        """The network that is evaluated: the average, if one is kept."""
        return self.model if self._average is None else self._average.module

    @property
    def _last_state(self) -> Path:
        return self._folder / "last.pt"

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self._train_loader) // self._recipe.optim.accumulate)

    @property
    def _total_steps(self) -> int:
        return self._recipe.schedule.epochs * self._steps_per_epoch

    def fit(self) -> History:
        """Trains all epochs that are left, or until ``schedule.patience`` ends.

        On SIGINT or SIGTERM it finishes the step, saves the state and raises KeyboardInterrupt.

        Raises:
            FloatingPointError: the loss is no longer finite.
            KeyboardInterrupt: as said.
        """
        with self.interruption:
            try:
                while len(self._rows) < self._recipe.schedule.epochs and not self._gave_up():
                    self._run_epoch(len(self._rows))
            finally:
                self._journal.close()
        return self.history

    def resume(self) -> None:
        """Takes up a run of the same recipe where it was last saved, be it within an epoch, or at
        the beginning.

        Raises:
            CheckpointError: the state is damaged or of another recipe or model.
        """
        if not self._last_state.exists():  # killed before it was saved at all
            if self._world.writes:
                self._journal.go_back(0, step=0)
            return
        state = load_state(self._last_state)
        if state["total_steps"] != self._total_steps:
            raise CheckpointError(
                f"{self._last_state}: expected a run of {self._total_steps} steps, "
                f"got one of {state['total_steps']}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            if self._average is not None:
                self._average.load_state_dict(state["average"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self._last_state}: expected the state of this model, got: {error}"
            ) from error
        self._scaler.load_state_dict(state["scaler"])
        self._rows = [EpochRow(**row) for row in state["rows"]]
        self._loader_state = state["loader"]
        self._seconds = state["seconds"]
        if self._world.writes:
            # The sums of all processes; the others begin theirs at zero.
            self._metrics.load_state_dict(state["metrics"])
            self._journal.go_back(state["journal"], step=state["step"] + 1)

    def test(
        self, loader: Loader, *, others: Callable[[Loader], Tensor] | None = None
    ) -> TestResult:
        """Reloads the best weights and evaluates them, at the image size of their epoch.

        Args:
            loader: the test batches, this process's share of them.
            others: which image shows the other eye of the same patient
                (:func:`fastresnet.train.two_eyes.other_eyes`) among those that a loader has just
                given; needed for ``evaluation.two_eyes``.

        Raises:
            ConfigError: ``evaluation.two_eyes`` without pairs among the validation images.
        """
        load_weights(self.best_weights, self.model)
        best = self.history.best
        self._loader_state = None
        settings = self._recipe.evaluation
        thresholds = fusion = None
        if self._objective.is_regression and (settings.tune_thresholds or settings.two_eyes):
            self._val_loader.set_epoch(0, image_size=best.image_size)
            validation = self._evaluate(self.model, self._val_loader, "thresholds", final=True)
            if settings.two_eyes:
                eyes = others(self._val_loader)
                fusion = fit_fusion(validation, eyes)
                validation = fusion.applied(validation, eyes)
            if settings.tune_thresholds:
                thresholds = tune_thresholds(
                    validation.grades, validation.labels, classes=validation.classes
                )
        loader.set_epoch(0, image_size=best.image_size)
        evaluation = self._evaluate(self.model, loader, "test", final=True)
        if fusion is not None:
            evaluation = fusion.applied(evaluation, others(loader))
        if thresholds is not None or fusion is not None:
            evaluation = regraded(evaluation, self._objective, thresholds)
        return TestResult(evaluation, thresholds, fusion)

    def _gave_up(self) -> bool:
        patience = self._recipe.schedule.patience
        if patience is None or len(self._rows) <= patience:
            return False
        return len(self._rows) - self.history.best.epoch >= patience

    def _run_epoch(self, epoch: int) -> None:
        begin = time.perf_counter()
        image_size = self._recipe.schedule.image_size(epoch)
        title = f"epoch {epoch + 1}/{self._recipe.schedule.epochs}"
        self._train_loader.set_epoch(epoch, image_size=image_size)
        if self._loader_state is not None:
            self._train_loader.load_state_dict(self._loader_state)
        self._train(epoch, title)
        metrics = self._metrics.of_all(self._world)
        train_loss, train_accuracy = metrics.loss(), metrics.accuracy()

        self._val_loader.set_epoch(epoch, image_size=image_size)
        try:
            validation = self._evaluate(self._judged, self._val_loader, f"{title} val")
        except KeyboardInterrupt:
            self._save()
            raise
        ordinal = self._recipe.evaluation.ordinal
        self._seconds["total"] += time.perf_counter() - begin
        self._finish_epoch(
            EpochRow(
                epoch=epoch + 1,
                image_size=image_size,
                learning_rate=self._learning_rate((epoch + 1) * self._steps_per_epoch - 1),
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                val_loss=validation.loss,
                val_accuracy=validation.accuracy,
                val_kappa=validation.kappa if ordinal else None,
                val_auc=(
                    validation.referable_auc(self._recipe.evaluation.referable) if ordinal else None
                ),
                images_per_second=metrics.images / max(self._seconds["train"], 1e-9),
                data_seconds=self._seconds["data"],
                seconds=self._seconds["total"],
            )
        )

    def _finish_epoch(self, row: EpochRow) -> None:
        self._rows.append(row)
        self._metrics = RunningMetrics(self._device)
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._loader_state = None
        self._console.print(format_epoch(row, self._recipe.schedule.epochs), highlight=False)
        if self._world.writes:
            self._journal.write("epoch", **vars(row))
            self._journal.write_table([asdict(row) for row in self._rows])
            scalars = {name: value for name, value in vars(row).items() if name != "epoch"}
            self._journal.plot(row.epoch * self._steps_per_epoch, **scalars)
            # The best weights first: a kill between the two files repeats the epoch's end on
            # resume, which writes them again, bit for bit.
            if self.history.best is row:
                metadata = {
                    "epoch": row.epoch,
                    "image_size": row.image_size,
                    "recipe": to_dict(self._recipe),
                }
                # One value: safetensors writes several in an order of its own each time.
                save_weights(
                    self.best_weights, self._judged, metadata={"run": json.dumps(metadata)}
                )
        self._save()

    def _train(self, epoch: int, title: str) -> None:
        """Trains what is left of an epoch."""
        self.model.train()
        accumulate, loader = self._recipe.optim.accumulate, self._train_loader
        done = 0 if self._loader_state is None else self._loader_state["step"]
        before = dict(self._seconds)
        begin = time.perf_counter()
        with EpochProgress(self._console, f"{title} train", len(loader), done=done) as progress:
            batches = progress.timed(loader)
            while done < len(loader):
                step = epoch * self._steps_per_epoch + done // accumulate
                count = min(accumulate, len(loader) - done)
                images = self._step(islice(batches, count), step, count=count)
                done += count
                self._seconds["train"] = before["train"] + progress.seconds
                self._seconds["data"] = before["data"] + progress.waited
                for _ in range(count):
                    wants_note = progress.advance(images // count)
                if wants_note:
                    progress.show(
                        f"loss {self._metrics.loss():.4f}  acc {self._metrics.accuracy():.2%}"
                    )
                self._loader_state = loader.state_dict()
                stop = self._world.any(self.interruption.requested)
                if stop or self._world.any(self._is_due(step)):
                    spent = time.perf_counter() - begin
                    self._seconds["total"] = before["total"] + spent
                    self._save()
                if stop:
                    raise KeyboardInterrupt
        self._seconds["total"] = before["total"]

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]], step: int, *, count: int) -> int:
        """One step of the optimiser on ``count`` batches; returns how many images they had."""
        seed_step(self._recipe.seed, step, self._world.rank)
        set_learning_rate(self._optimizer, self._learning_rate(step))
        if self._captured is None:
            self._optimizer.zero_grad(set_to_none=True)
        total, loss_sum = 0, torch.zeros((), device=self._device)
        for index, (images, labels) in enumerate(batches, start=1):
            images, labels = to_device(images, labels, self._device)
            targets = labels
            if self._mix is not None:
                images, targets = self._mix(images, labels)
            if self._captured is not None:
                loss, predictions = self._captured(images, targets, count=count, first=index == 1)
            else:
                with self._synchronised(index == count):
                    loss, predictions = self._backward(images, targets, count)
            main = targets.argmax(1) if targets.ndim == 2 else targets
            self._metrics.update(loss, predictions, main)
            total += len(labels)
            loss_sum += loss / count
        if index != count:
            raise ValueError(f"expected a loader of {count - index} more batches, got none")
        self._update()
        if self._average is not None:
            self._average.update_parameters(self.model)
        self._log(step, loss_sum)
        return total

    def _backward(
        self, images: Tensor, targets: Tensor, count: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss and the predictions of one of ``count`` batches; adds its gradients."""
        with autocast(self._amp, self._device):
            outputs = self._replica(images)
            loss = self._objective.loss(outputs, targets)
        self._scaler.scale(loss / count).backward()
        return loss.detach(), self._objective.probabilities(outputs.detach()).argmax(1)

    def _update(self) -> None:
        if self._recipe.optim.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.optim.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def _synchronised(self, last: bool) -> AbstractContextManager:
        """Gradients are averaged over the processes at a step's last batch only."""
        if last or self._replica is self.model:
            return nullcontext()
        return self._replica.no_sync()

    def _log(self, step: int, loss: Tensor) -> None:
        every = self._recipe.log_every
        if not every or (step + 1) % every or not self._world.writes:
            return
        learning_rate, value = self._learning_rate(step), loss.item()
        self._journal.write("step", step=step + 1, loss=value, learning_rate=learning_rate)
        self._journal.plot(step + 1, step_loss=value, step_learning_rate=learning_rate)

    def _learning_rate(self, step: int) -> float:
        return self._recipe.optim.lr * schedule_factor(
            step, config=self._recipe.schedule, steps_per_epoch=self._steps_per_epoch
        )

    def _is_due(self, step: int) -> bool:
        """Whether the state is to be saved behind this step."""
        every = self._recipe.checkpoint
        if every.every_steps is not None and (step + 1) % every.every_steps == 0:
            return True
        return (
            every.every_seconds is not None
            and time.monotonic() - self._saved >= every.every_seconds
        )

    def _save(self) -> None:
        """Writes the state as it is between two steps."""
        metrics = self._metrics.of_all(self._world)
        if self._world.writes:
            done = 0 if self._loader_state is None else self._loader_state["step"]
            state = {
                "model": self.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
                "average": None if self._average is None else self._average.state_dict(),
                "rows": [vars(row) for row in self._rows],
                "metrics": metrics.state_dict(),
                "loader": self._loader_state,
                "seconds": self._seconds,
                "journal": self._journal.mark(),
                "step": len(self._rows) * self._steps_per_epoch
                + -(-done // self._recipe.optim.accumulate),
                "total_steps": self._total_steps,
            }
            save_state(self._last_state, state)
        self._saved = time.monotonic()

    def _evaluate(
        self, model: nn.Module, loader: Loader, title: str, *, final: bool = False
    ) -> Evaluation:
        return evaluate(
            model,
            loader,
            self._objective,
            amp=self._amp,
            console=self._console,
            title=title,
            flips=final and self._recipe.evaluation.flips,
            world=self._world,
            # Several processes would not stop at the same batch.
            poll=self._poll if self._world.size == 1 and not final else None,
        )

    def _poll(self) -> None:
        if self.interruption.requested:
            raise KeyboardInterrupt


def _replicate(model: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    """The model as it is called in training: its gradients are the mean over the processes."""
    if world.size == 1:
        return model
    # A later name for the same: torch 2.14 warns of the earlier one.
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(model, **{name: not recipe.sync_batch_norm})


def format_epoch(row: EpochRow, epochs: int) -> str:
    """The line that an epoch prints."""
    kappa = "" if row.val_kappa is None else f" kappa {row.val_kappa:.4f}"
    return (
        f"epoch {row.epoch}/{epochs}  lr {row.learning_rate:.4g}  "
        f"train loss {row.train_loss:.4f} acc {row.train_accuracy:.2%}  "
        f"val loss {row.val_loss:.4f} acc {row.val_accuracy:.2%}{kappa}  "
        f"{speed(row.images_per_second)}  {row.seconds:.0f} s"
    )
