# SPDX-License-Identifier: Apache-2.0
"""Whole runs of recipes: what ``fastresnet train`` does, as functions.

    from pathlib import Path

    from fastresnet.runs import open_data, train_recipe
    from fastresnet.train import RECIPES, apply_overrides

    recipe = apply_overrides(RECIPES["cifar10-resnet18"](), ["schedule.epochs=20"])
    result = train_recipe(recipe, open_data(recipe, Path("cifar")), folder=Path("runs/cifar"))
    print(result.evaluation.accuracy)

It needs the packages of the ``train`` extra.
"""

from fastresnet.runs.training import format_figures, train_recipe
from fastresnet.runs.wiring import (
    Dataset,
    ImagePart,
    Parts,
    build_loader,
    build_network,
    build_objective,
    check_two_eyes,
    open_data,
    other_eye,
    pixels,
    shown,
    split,
)

__all__ = [
    "Dataset",
    "ImagePart",
    "Parts",
    "build_loader",
    "build_network",
    "build_objective",
    "check_two_eyes",
    "format_figures",
    "open_data",
    "other_eye",
    "pixels",
    "shown",
    "split",
    "train_recipe",
]
