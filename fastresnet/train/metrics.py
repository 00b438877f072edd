# SPDX-License-Identifier: Apache-2.0
"""Counts of right and wrong predictions, and the running means of an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """A pass over a data set: mean loss, and ``confusion`` [classes, classes] (int64), in which
    row is the true class and column the predicted one."""

    loss: float
    confusion: Tensor

    @property
    def images(self) -> int:
        """Images evaluated."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of the images predicted right."""
        return int(self.confusion.trace()) / self.images


class RunningMetrics:
    """Sums of loss, right predictions and images, kept on the device and read when asked for:
    a read waits for the device, so the loop reads now and then rather than every step."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._right = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: its mean loss, ``logits`` [B, classes] and ``labels`` [B]."""
        self._loss += loss.detach() * len(labels)
        self._right += (logits.detach().argmax(1) == labels).sum()
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
