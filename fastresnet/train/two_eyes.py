# SPDX-License-Identifier: Apache-2.0
"""Both eyes of a patient graded together: retinopathy is a disease of the whole body, so that what
one eye shows says something of the other."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastresnet.train.config import ConfigError
from fastresnet.train.metrics import Evaluation


class Fusion(NamedTuple):
    """A grade from those that a regression gives both eyes: a weighted sum."""

    own: float
    other: float
    bias: float

    def applied(self, evaluation: Evaluation, others: Tensor) -> Evaluation:
        """The evaluation with its grades fused; what they say of classes is still to be renewed.

        Args:
            evaluation: of a regression.
            others: as :func:`other_eyes` finds them.

        Raises:
            ValueError: there are not as many of those as images.
        """
        grades = evaluation.grades
        if len(others) != len(grades):
            raise ValueError(f"expected the other eye of {len(grades)} images, got {len(others)}")
        return replace(
            evaluation, grades=self.own * grades + self.other * grades[others] + self.bias
        )


def other_eyes(patients: Tensor) -> Tensor:
    """Which image shows the other eye of the same patient; an image that is a patient's only one,
    or one of more than two, stands for itself.

    Args:
        patients: int64 [N], equal where images are of one patient.

    Returns:
        int64 [N], indices.
    """
    order = torch.argsort(patients, stable=True)
    _, counts = torch.unique_consecutive(patients[order], return_counts=True)
    ends = counts.cumsum(0)
    first = order[(ends - counts)[counts == 2]]
    second = order[(ends - 1)[counts == 2]]
    others = torch.arange(len(patients))
    others[first], others[second] = second, first
    return others


def check_pairs(others: Tensor) -> None:
    """Whether some of the validation images show both eyes of a patient.

    Args:
        others: as :func:`other_eyes` finds them.

    Raises:
        ConfigError: none do.
    """
    if torch.equal(others, torch.arange(len(others))):
        raise ConfigError(
            "evaluation.two_eyes: expected validation images of both eyes of a patient, got none"
        )


def fit_fusion(evaluation: Evaluation, others: Tensor) -> Fusion:
    """The weights whose grades are nearest to the labels, in the sum of squares.

    Args:
        evaluation: of images that were not trained on.
        others: as :func:`other_eyes` finds them.

    Raises:
        ConfigError: no patient has two images.
    """
    check_pairs(others)
    grades = evaluation.grades.double()
    columns = torch.stack([grades, grades[others], torch.ones_like(grades)], dim=1)
    labels = evaluation.labels.double()[:, None]
    return Fusion(*torch.linalg.lstsq(columns, labels, driver="gelsd").solution.flatten().tolist())
