# SPDX-License-Identifier: Apache-2.0
"""The evaluation pass, and where a regression's grades part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_cohen_kappa

from fastresnet.train.batches import Loader, to_device
from fastresnet.train.distributed import World
from fastresnet.train.metrics import Evaluation, RunningMetrics
from fastresnet.train.objective import Objective
from fastresnet.train.precision import autocast
from fastresnet.train.progress import EpochProgress

_FLIPS = ((), (3,), (2,), (2, 3))
_THRESHOLD_ROUNDS = 3
_THRESHOLD_STEPS = 40


def evaluate(
    model: nn.Module,
    loader: Loader,
    objective: Objective,
    *,
    amp: torch.dtype | None,
    console: Console,
    title: str,
    flips: bool = False,
    thresholds: Tensor | None = None,
    world: World | None = None,
    poll: Callable[[], None] | None = None,
) -> Evaluation:
    """Predicts every batch of the loader in eval mode.

    The loss is that of training, smoothed and weighted, so that the two curves can be compared.

    Args:
        model: the network.
        loader: the batches, or this process's share of them.
        objective: loss, and meaning of the outputs.
        amp: the type of autocast, or None.
        console: where progress goes.
        title: what is in progress.
        flips: predict the mean of the outputs (of a classifier: of the probabilities) over the
            image, both its flips and its half turn.
        thresholds: of a regression (:meth:`Objective.probabilities`).
        world: the processes that share the images out among them; each gets the whole result.
        poll: called before each batch; it may raise.

    Raises:
        ValueError: there is no batch.
        FloatingPointError: the loss is not finite.
    """
    world = world or World()
    device = next(model.parameters()).device
    model.eval()
    metrics = RunningMetrics(device)
    batches: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode(), EpochProgress(console, title, len(loader)) as progress:
        for images, labels in progress.timed(loader):
            if poll is not None:
                poll()
            images, labels = to_device(images, labels, device)
            with autocast(amp, device):
                outputs = [model(images.flip(dims)) for dims in (_FLIPS if flips else ((),))]
            # The loss is that of the image as it stands.
            loss = objective.loss(outputs[0], labels)
            if objective.is_regression:
                outputs = torch.stack(outputs).float().mean(0)
                predictions = objective.probabilities(outputs, thresholds)
            else:
                outputs = predictions = torch.stack(
                    [objective.probabilities(view) for view in outputs]
                ).mean(0)
            metrics.update(loss, predictions.argmax(1), labels)
            batches.append((outputs.cpu(), labels.cpu()))
            if progress.advance(len(labels)):
                progress.show(f"acc {metrics.accuracy():.2%}")
    batches = world.interleave(batches)
    if not batches:
        raise ValueError("expected a loader with at least one batch, got none")
    outputs, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    loss = metrics.of_all(world).loss()
    if objective.is_regression:
        return regraded(Evaluation(loss, outputs, labels, outputs[:, 0]), objective, thresholds)
    return Evaluation(loss, outputs, labels)


def regraded(evaluation: Evaluation, objective: Objective, thresholds: Tensor | None) -> Evaluation:
    """The evaluation of a regression with classes that begin at other thresholds."""
    return Evaluation(
        evaluation.loss,
        objective.probabilities(evaluation.grades[:, None], thresholds),
        evaluation.labels,
        evaluation.grades,
    )


def tune_thresholds(grades: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """Thresholds between the grades, ascending, that give the highest quadratic weighted kappa.

    One after the other is moved to the best of a grid between its neighbours, three times over;
    where that gains nothing it stays, half-way between two grades at first.

    Args:
        grades: float [N], a regression's outputs.
        labels: int64 [N].
        classes: how many there are.

    Returns:
        float32 [classes - 1].
    """
    thresholds = torch.arange(classes - 1) + 0.5

    def kappa(candidate: Tensor) -> float:
        predictions = torch.bucketize(grades, candidate, right=True)
        return multiclass_cohen_kappa(
            predictions, labels, num_classes=classes, weights="quadratic", validate_args=False
        ).item()

    best = kappa(thresholds)
    for _ in range(_THRESHOLD_ROUNDS):
        for index in range(classes - 1):
            low = thresholds[index - 1] if index else thresholds[index] - 1
            high = thresholds[index + 1] if index < classes - 2 else thresholds[index] + 1
            for place in torch.linspace(float(low), float(high), _THRESHOLD_STEPS + 1)[1:-1]:
                candidate = thresholds.clone()
                candidate[index] = place
                found = kappa(candidate)
                if found > best:
                    best, thresholds = found, candidate
    return thresholds
