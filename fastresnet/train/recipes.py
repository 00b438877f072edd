# SPDX-License-Identifier: Apache-2.0
"""Recipes: functions that return a configuration, by the name that the command line uses."""

from __future__ import annotations

from collections.abc import Callable

from fastresnet.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, ScheduleConfig


def fashion_mnist() -> Recipe:
    """ResNet-18 for 32 x 32 images on Fashion-MNIST's 60,000 pictures of clothes.

    The first epoch sees the images at half the size, where a step costs a third. Two epochs are too
    few for random crops to pay: the padding just makes 28 x 28 into 32 x 32.
    """
    return Recipe(
        name="fashion-mnist",
        data=DataConfig(dataset="fashion-mnist", mean=(0.2860,), std=(0.3530,), padding=2),
        model=ModelConfig(name="cifar_resnet18"),
        optim=OptimConfig(lr=0.1, weight_decay=5e-4),
        schedule=ScheduleConfig(epochs=2, sizes=(16, 32)),
        label_smoothing=0.05,
    )


def digits() -> Recipe:
    """ResNet-18 on scikit-learn's 1,797 handwritten digits: no network and no files needed."""
    return Recipe(
        name="digits",
        data=DataConfig(dataset="digits", mean=(0.3127,), std=(0.3566,), batch_size=64, flip=0.0),
        model=ModelConfig(name="cifar_resnet18"),
        optim=OptimConfig(lr=0.05, weight_decay=5e-4),
        schedule=ScheduleConfig(epochs=8, sizes=(16, 32)),
        label_smoothing=0.05,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"digits": digits, "fashion-mnist": fashion_mnist}
