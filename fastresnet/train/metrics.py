# SPDX-License-Identifier: Apache-2.0
"""The running means of an epoch, and what is computed from a whole pass's predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_cohen_kappa,
    multiclass_confusion_matrix,
    multiclass_recall,
)

from fastresnet.train.distributed import World


@dataclass(frozen=True)
class Evaluation:
    """A pass over a data set, image by image.

    ``probabilities`` is float32 [N, classes], ``labels`` int64 [N]. ``grades``, float32 [N], are
    the outputs of a regression, else None.
    """

    loss: float
    probabilities: Tensor
    labels: Tensor
    grades: Tensor | None = None

    @property
    def images(self) -> int:
        """Images evaluated."""
        return len(self.labels)

    @property
    def classes(self) -> int:
        """Classes there are."""
        return self.probabilities.shape[1]

    @cached_property
    def predictions(self) -> Tensor:
        """The most probable class of each image, int64 [N]."""
        return self.probabilities.argmax(1)

    @cached_property
    def confusion(self) -> Tensor:
        """Images, int64 [classes, classes]: row is the true class and column the predicted one."""
        return multiclass_confusion_matrix(
            self.predictions, self.labels, num_classes=self.classes, validate_args=False
        )

    @property
    def accuracy(self) -> float:
        """Share of the images predicted right."""
        return int(self.confusion.trace()) / self.images

    @property
    def majority(self) -> float:
        """The accuracy of calling everything the most frequent class."""
        return int(self.confusion.sum(1).max()) / self.images

    @property
    def recalls(self) -> list[float | None]:
        """Share of each class's images predicted right; None for a class without images."""
        shares = multiclass_recall(
            self.predictions, self.labels, num_classes=self.classes, average="none"
        )
        counts = self.confusion.sum(1)
        return [
            float(share) if count else None for share, count in zip(shares, counts, strict=True)
        ]

    @cached_property
    def kappa(self) -> float | None:
        """Quadratic weighted kappa (Cohen 1968); None where one class is all that there is."""
        kappa = multiclass_cohen_kappa(
            self.predictions, self.labels, num_classes=self.classes, weights="quadratic"
        ).item()
        return kappa if math.isfinite(kappa) else None

    def referable_auc(self, lowest: int) -> float | None:
        """Area under the ROC curve of "label >= lowest"; None where all labels lie on one side.

        Ranked by the predicted grade of a regression, else by the probability of those classes.
        """
        positive = self.labels >= lowest
        if positive.all() or not positive.any():
            return None
        scores = self.grades
        if scores is None:
            scores = self.probabilities[:, lowest:].sum(1)
        else:
            # torchmetrics takes scores outside 0..1 for logits and would round them together.
            scores = (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-12)
        return binary_auroc(scores.double(), positive.long()).item()

    def figures(self, *, ordinal: bool, referable: int) -> dict[str, Any]:
        """What is reported, as plain values: with ``ordinal`` also what takes labels as grades."""
        figures = {
            "images": self.images,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "majority": self.majority,
            "recall": self.recalls,
        }
        if ordinal:
            figures["kappa"] = self.kappa
            figures["auc"] = self.referable_auc(referable)
        return figures


class RunningMetrics:
    """Sums of loss, right predictions and images, kept on the device and read when asked for:
    a read waits for the device, so the loop reads now and then rather than every step."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._right = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def update(self, loss: Tensor, predictions: Tensor, labels: Tensor) -> None:
        """Adds a batch: its mean loss, and predicted and true classes, int64 [B] each."""
        self._loss += loss.detach() * len(labels)
        self._right += (predictions == labels).sum()
        self.images += len(labels)

    def loss(self) -> float:
        """Mean loss so far.

        Raises:
            FloatingPointError: it is not finite: the training has diverged.
        """
        loss = self._loss.item() / max(self.images, 1)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training diverged: the mean loss over {self.images} images is {loss}; "
                "try a lower optim.lr"
            )
        return loss

    def accuracy(self) -> float:
        """Share of the images predicted right so far."""
        return self._right.item() / max(self.images, 1)

    def of_all(self, world: World) -> RunningMetrics:
        """The sums over all processes."""
        total = RunningMetrics(self._loss.device)
        total._loss, total._right = world.sum(self._loss), world.sum(self._right)
        total.images = int(world.sum(torch.tensor(self.images, device=self._loss.device)))
        return total

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"loss": self._loss, "right": self._right, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the sums of a :meth:`state_dict`."""
        self._loss.copy_(state["loss"])
        self._right.copy_(state["right"])
        self.images = state["images"]
