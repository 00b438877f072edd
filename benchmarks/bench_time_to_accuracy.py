# SPDX-License-Identifier: Apache-2.0
"""Seconds of training until a ResNet-18 knows an accuracy: ours beside torchvision's.

Both train as the recipe cifar10-fast says, from the same weights, and take turns epoch by epoch in
one process. Ours is fastresnet's network on its own loader; the peer is torchvision's with the same
stem, in channels_last and bfloat16 as well, on its usual loader: PIL images, v2 transforms, a
process a processor. The clock runs in training, waiting for data included; the test behind each
epoch is not counted. The images are Fashion-MNIST's, written as CIFAR-10's archive.

It takes the better part of an hour, so only `--time-to-accuracy` runs it. The networks differ in
their random crops and flips, and there is one run of each: a time may be an epoch off by chance.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torchvision
from harness import ERROR_RATIO, Row, machine, relative_errors, timestamp
from PIL import Image
from providers import build
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastresnet import models
from fastresnet.data import (
    Augment,
    ImageSet,
    TensorLoader,
    load_cifar10,
    load_fashion_mnist,
    write_cifar10,
)
from fastresnet.train import RECIPES, Recipe, apply_overrides
from fastresnet.train.batches import Loader
from fastresnet.train.config import to_dict
from fastresnet.train.objective import Objective
from fastresnet.train.optim import build_optimizer, schedule_factor, set_learning_rate
from fastresnet.train.precision import autocast, resolve_amp

ARCHITECTURE = "cifar_resnet18"
TARGETS = (0.90, 0.93)
# Clothes are known after fewer epochs than CIFAR-10's photographs.
CHANGES = (
    "schedule.epochs=9",
    "schedule.sizes=16,16,16,16,20,20,24,28,28",
    "augment.padding=2",
)
BAR = 0.5  # of the peer's seconds
WORKERS = 2
GREY_LEVELS = 1.0  # on average, between two loaders' test images
CPU = torch.device("cpu")


class TransformedImages(Dataset):
    """Torchvision's way: an image at a time, a transform after the other."""

    def __init__(self, images: ImageSet, augment: Augment, size: int, *, training: bool) -> None:
        self._images = [Image.fromarray(image) for image in images.images.numpy()]
        self._labels = images.labels.tolist()
        self.transform = _transform(augment, size, training=training)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self._images[index]), self._labels[index]


def _transform(augment: Augment, size: int, *, training: bool) -> v2.Transform:
    steps: list[nn.Module] = []
    if training:
        steps += [
            v2.RandomCrop(augment.size, padding=augment.padding),
            v2.RandomHorizontalFlip(augment.hflip),
        ]
    if size != augment.size:
        steps.append(v2.Resize(size, antialias=True))
    steps += [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(augment.mean, augment.std),
    ]
    return v2.Compose(steps)


class TorchvisionLoader:
    """A DataLoader on :class:`TransformedImages`, made anew for an epoch of another size."""

    def __init__(
        self, images: ImageSet, augment: Augment, batch_size: int, *, training: bool
    ) -> None:
        known = Augment(
            size=augment.size,
            crop="random",
            padding=augment.padding,
            hflip=augment.hflip,
            mean=augment.mean,
            std=augment.std,
        )
        if augment != known:
            raise ValueError(f"expected random crops and flips only, got {augment}")
        self._dataset = TransformedImages(images, augment, augment.height, training=training)
        self._augment, self._batch_size, self._training = augment, batch_size, training
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._loader)

    def set_epoch(self, epoch: int, *, image_size: int | None = None) -> None:
        self._dataset.transform = _transform(
            self._augment, image_size or self._augment.height, training=self._training
        )
        self._loader = DataLoader(
            self._dataset,
            self._batch_size,
            shuffle=self._training,
            drop_last=self._training,
            num_workers=WORKERS,
        )


@dataclass
class Training:
    """A network in training, and what became of it: seconds and test accuracy after each epoch."""

    name: str
    role: str
    model: nn.Module
    loader: Loader | TorchvisionLoader
    test_loader: Loader | TorchvisionLoader
    recipe: Recipe
    objective: Objective
    seconds: list[float] = field(default_factory=list)  # of all epochs until then
    accuracies: list[float] = field(default_factory=list)
    images: int = 0

    def __post_init__(self) -> None:
        self._optimizer = build_optimizer(self.model, self.recipe.optim)
        self._average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema), use_buffers=True
        )
        self._amp = resolve_amp(self.recipe.amp, CPU)

    def autocast(self) -> AbstractContextManager:
        return autocast(self._amp, CPU)

    def epoch(self) -> None:
        """Trains the next epoch, against the clock, and tests the average of the weights."""
        number = len(self.seconds)
        size = self.recipe.schedule.image_size(number)
        begin = time.perf_counter()
        self.loader.set_epoch(number, image_size=size)
        self.model.train()
        for step, (images, labels) in enumerate(self.loader, start=number * len(self.loader)):
            self._step(step, images, labels)
            self.images += len(labels)
        spent = time.perf_counter() - begin
        self.seconds.append(spent + (self.seconds[-1] if self.seconds else 0.0))
        self.accuracies.append(self._test(number, size))

    def _step(self, step: int, images: Tensor, labels: Tensor) -> None:
        factor = schedule_factor(
            step, config=self.recipe.schedule, steps_per_epoch=len(self.loader)
        )
        set_learning_rate(self._optimizer, self.recipe.optim.lr * factor)
        self._optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            outputs = self.model(images.contiguous(memory_format=torch.channels_last))
            loss = self.objective.loss(outputs, labels)
        loss.backward()
        self._optimizer.step()
        self._average.update_parameters(self.model)

    @torch.inference_mode()
    def _test(self, number: int, size: int | None) -> float:
        self.test_loader.set_epoch(number, image_size=size)
        network = self._average.module.eval()
        right = images_seen = 0
        for images, labels in self.test_loader:
            with self.autocast():
                outputs = network(images.contiguous(memory_format=torch.channels_last))
            right += int((outputs.argmax(1) == labels).sum())
            images_seen += len(labels)
        return right / images_seen

    def time_to(self, target: float) -> float | None:
        """Seconds at the end of the first epoch that is at least so accurate; None without one."""
        reached = zip(self.seconds, self.accuracies, strict=True)
        return next((seconds for seconds, accuracy in reached if accuracy >= target), None)


def trainings(recipe: Recipe, train: ImageSet, test: ImageSet, *, classes: int) -> list[Training]:
    """The two of them, with the same weights."""
    objective = Objective(recipe.loss, train.labels, classes=classes)
    batch = recipe.data.batch_size
    torch.manual_seed(recipe.seed)
    peer = build(torchvision.models, ARCHITECTURE)
    ours = build(models, ARCHITECTURE)
    ours.load_state_dict(peer.state_dict())
    common = {"recipe": recipe, "objective": objective}
    return [
        Training(
            "torchvision",
            "baseline",
            peer.to(memory_format=torch.channels_last),
            TorchvisionLoader(train, recipe.augment, batch, training=True),
            TorchvisionLoader(test, recipe.augment, batch, training=False),
            **common,
        ),
        Training(
            "fastresnet",
            "ours",
            ours.to(memory_format=torch.channels_last),
            TensorLoader(
                train,
                recipe.augment,
                batch_size=batch,
                training=True,
                seed=recipe.seed,
                drop_last=True,
            ),
            TensorLoader(test, recipe.augment, batch_size=batch, training=False),
            **common,
        ),
    ]


@torch.no_grad()
def check(peer: Training, ours: Training) -> dict[str, dict[str, float]]:
    """Compares test images at every size, and the logits of a batch with the peer's in float64;
    returns the logits' errors by provider.

    Raises:
        ValueError: images are further apart than a grey level, or our logits are further off than
            1.5 times the peer's.
    """
    recipe = peer.recipe
    levels = 255 * torch.tensor(recipe.augment.std)[:, None, None]
    for size in {*recipe.schedule.sizes, recipe.augment.height}:
        batches = []
        for training in (peer, ours):
            training.test_loader.set_epoch(0, image_size=size)
            images, labels = next(iter(training.test_loader))
            batches.append((images.contiguous(memory_format=torch.channels_last), labels))
        (theirs, _), (images, labels) = batches
        apart = ((theirs - images).abs() * levels).mean().item()
        if not torch.equal(batches[0][1], labels) or apart > GREY_LEVELS:
            raise ValueError(f"at {size} px test images are {apart:.2f} grey levels apart")
    truth = {"logits": copy.deepcopy(peer.model).double().eval()(images.double())}
    errors = {}
    for training in (peer, ours):
        with training.autocast():
            outputs = {"logits": training.model.eval()(images)}
        errors[training.name] = relative_errors(outputs, truth)
    got, allowed = (errors[training.name]["logits"] for training in (ours, peer))
    rounding = torch.finfo(torch.bfloat16 if ours._amp else torch.float32).eps
    if not got <= ERROR_RATIO * max(allowed, rounding):
        raise ValueError(f"our logits are {got:.2e} from float64, the peer's {allowed:.2e}")
    return errors


def race(
    recipe: Recipe, train: ImageSet, test: ImageSet, *, classes: int, targets: Sequence[float]
) -> list[list[Row]]:
    """Trains both until they have reached all targets, or the end of the recipe; the rows of each
    target."""
    peer, ours = both = trainings(recipe, train, test, classes=classes)
    errors = check(peer, ours)
    for epoch in range(recipe.schedule.epochs):
        if all(training.time_to(max(targets)) is not None for training in both):
            break
        for training in both if epoch % 2 == 0 else reversed(both):
            training.epoch()
            print(
                f"{training.name}, epoch {epoch + 1}: {training.seconds[-1]:.0f} s, "
                f"{training.accuracies[-1]:.2%}",
                flush=True,
            )
    now, here = timestamp(), machine("cpu")
    return [[_row(one, target, errors, now, here) for one in both] for target in targets]


def _row(
    training: Training,
    target: float,
    errors: dict[str, dict[str, float]],
    now: str,
    here: dict[str, object],
) -> Row:
    seconds = training.time_to(target)
    best = max(training.accuracies)
    return Row(
        suite="time_to_accuracy",
        case=f"fashion-mnist-as-cifar10-{100 * target:g}%",
        provider=training.name,
        role=training.role,
        metric="seconds",
        unit="s",
        p20=seconds,
        p50=seconds,
        p80=seconds,
        n=1,
        status="ok" if seconds is not None else f"failed: {best:.2%} at best",
        errors=errors[training.name],
        config={"target": target, "recipe": to_dict(training.recipe), "workers": WORKERS},
        bar=BAR,
        machine=here,
        timestamp=now,
        better="lower",
        figures={
            "images/s": training.images / training.seconds[-1],
            **{f"s after epoch {i}": value for i, value in enumerate(training.seconds, start=1)},
            **{f"right after epoch {i}": v for i, v in enumerate(training.accuracies, start=1)},
        },
    )


@pytest.mark.time_to_accuracy
def test_time_to_accuracy(tmp_path: Path, record: Callable[[Sequence[Row]], None]) -> None:
    write_cifar10(load_fashion_mnist(), tmp_path)
    dataset = load_cifar10(tmp_path, download=False)
    recipe = apply_overrides(RECIPES["cifar10-fast"](), CHANGES)
    train, _ = dataset.train.split(recipe.data.validation, seed=recipe.seed)
    classes = len(dataset.classes)
    for rows in race(recipe, train, dataset.test, classes=classes, targets=TARGETS):
        record(rows)
