# SPDX-License-Identifier: Apache-2.0
"""What a network's outputs mean, and the loss that is minimised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastresnet.train.config import ConfigError, LossConfig


class Objective:
    """The loss of a batch, and probabilities of classes from outputs.

    The loss is the sum over the images of weight x loss, divided by the number of images: two
    halves of a batch have the mean of their losses, whatever classes are in them.

    Args:
        config: kind, label smoothing, weights of classes.
        labels: int64 [N] of the training images, for balanced weights.
        classes: how many there are.

    Raises:
        ConfigError: there are not as many weights as classes, or a class to be balanced is empty.
    """

    def __init__(self, config: LossConfig, labels: Tensor, *, classes: int) -> None:
        self.classes = classes
        self.is_regression = config.kind == "regression"
        self._label_smoothing = config.label_smoothing
        self._weights = _class_weights(config, labels, classes)

    @property
    def outputs(self) -> int:
        """Numbers that the network has to give for an image."""
        return 1 if self.is_regression else self.classes

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch.

        Args:
            outputs: [B, outputs], of any dtype; computed in float32.
            targets: labels, int64 [B], or shares of classes, float [B, classes], of blended images.
        """
        outputs = outputs.float()
        reduction = "mean" if self._weights is None else "none"
        if self.is_regression:
            losses = F.mse_loss(outputs.flatten(), self._grades(targets), reduction=reduction)
        else:
            losses = F.cross_entropy(
                outputs, targets, label_smoothing=self._label_smoothing, reduction=reduction
            )
        if self._weights is None:
            return losses
        # Moved once: a copy from the host cannot be in a CUDA graph.
        weights = self._weights = self._weights.to(outputs.device)
        weights = targets.to(weights) @ weights if targets.ndim == 2 else weights[targets]
        return (losses * weights).mean()

    def _grades(self, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            return targets.float()
        return targets.float() @ torch.arange(self.classes, device=targets.device).float()

    def probabilities(self, outputs: Tensor, thresholds: Tensor | None = None) -> Tensor:
        """Probabilities of the classes, float32 [B, classes].

        The most probable one is the prediction. A regression's grade is moved so that thresholds
        come to lie half-way between two grades, and shared out among its two neighbours.

        Args:
            outputs: [B, outputs].
            thresholds: of a regression, [classes - 1]: grades at which the next class begins;
                default: half-way.
        """
        outputs = outputs.float()
        if not self.is_regression:
            return outputs.softmax(1)
        grades = outputs.flatten()
        if thresholds is not None:
            grades = _interpolate(grades, thresholds.to(grades))
        grades = grades.clamp(0, self.classes - 1)
        places = torch.arange(self.classes, device=grades.device)
        return (1 - (grades[:, None] - places).abs()).clamp(min=0)


def _interpolate(grades: Tensor, thresholds: Tensor) -> Tensor:
    """The map, of slope 1 outside the thresholds and linear between, that takes them to 0.5, 1.5
    and so on."""
    halves = torch.arange(len(thresholds), device=grades.device) + 0.5
    index = torch.searchsorted(thresholds, grades.contiguous(), right=True)
    low = (index - 1).clamp(min=0)
    high = index.clamp(max=len(thresholds) - 1)
    width = thresholds[high] - thresholds[low]
    slope = torch.where(width > 0, 1 / width.clamp(min=1e-6), torch.ones_like(width))
    return halves[low] + (grades - thresholds[low]) * slope


def _class_weights(config: LossConfig, labels: Tensor, classes: int) -> Tensor | None:
    """What an image of each class weighs, float32 [classes]; None where all weigh the same."""
    if config.class_weights == "none":
        return None
    if config.class_weights == "balanced":
        counts = torch.bincount(labels, minlength=classes)
        if counts.min() == 0:
            raise ConfigError(
                "loss.class_weights: expected training images of every class to balance, got none "
                f"of class {int(counts.argmin())}"
            )
        return len(labels) / (classes * counts.float())
    if len(config.class_weights) != classes:
        raise ConfigError(
            f"loss.class_weights: expected {classes} weights, one for each class, got "
            f"{len(config.class_weights)}"
        )
    return torch.tensor(config.class_weights)
