# SPDX-License-Identifier: Apache-2.0
"""Recipes: functions that return a configuration, by the name that the command line uses.

Where a recipe follows a published system, what that leaves open is said to be ours. Optimisers of
those systems decay all parameters, as torch's do by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastresnet.data.augment import Augment
from fastresnet.train.config import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ScheduleConfig,
)

_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of its training images
_CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def fashion_mnist() -> Recipe:
    """ResNet-18 for 32 x 32 images on Fashion-MNIST's 60,000 pictures of clothes.

    The first epoch sees the images at half the size, where a step costs a third. Two epochs are too
    few for random crops to pay: the padding just makes 28 x 28 into 32 x 32.
    """
    return Recipe(
        name="fashion-mnist",
        data=DataConfig(dataset="fashion-mnist"),
        augment=Augment(
            size=32,
            resize=28,
            crop="random",
            padding=2,
            hflip=0.5,
            mean=(0.2860,),
            std=(0.3530,),
        ),
        model=ModelConfig(name="cifar_resnet18"),
        optim=OptimConfig(lr=0.1, weight_decay=5e-4),
        schedule=ScheduleConfig(epochs=2, sizes=(16, 32)),
        loss=LossConfig(label_smoothing=0.05),
    )


def digits() -> Recipe:
    """ResNet-18 on scikit-learn's 1,797 handwritten digits: no network and no files needed."""
    return Recipe(
        name="digits",
        data=DataConfig(dataset="digits", batch_size=64),
        augment=Augment(
            size=32, resize=28, crop="random", padding=4, mean=(0.3127,), std=(0.3566,)
        ),
        model=ModelConfig(name="cifar_resnet18"),
        optim=OptimConfig(lr=0.05, weight_decay=5e-4),
        schedule=ScheduleConfig(epochs=8, sizes=(16, 32)),
        loss=LossConfig(label_smoothing=0.05),
    )


def cifar10_simplecnn() -> Recipe:
    """Two convolutions on CIFAR-10: the first task of a course's laboratory.

    Ours: everything but the network; the laboratory asks to vary the learning rate, its schedule,
    normalisation and augmentation.
    """
    return Recipe(
        name="cifar10-simplecnn",
        data=DataConfig(dataset="cifar10", validation=0.1),
        augment=_cifar10_augment(),
        model=ModelConfig(name="simple_cnn"),
        optim=OptimConfig(lr=0.05, weight_decay=5e-4),
        schedule=ScheduleConfig(epochs=40, kind="cosine", warmup=0.05),
    )


def cifar10_resnet18() -> Recipe:
    """ResNet-18 for 32 x 32 images on CIFAR-10: the second task of that laboratory, with the usual
    settings of the field."""
    return replace(
        cifar10_simplecnn(),
        name="cifar10-resnet18",
        model=ModelConfig(name="cifar_resnet18"),
        optim=OptimConfig(lr=0.1, weight_decay=5e-4),
        schedule=ScheduleConfig(epochs=60, kind="cosine", warmup=0.05),
    )


def cifar10_fast() -> Recipe:
    """ResNet-18 on CIFAR-10 in few epochs: smaller images at first, one cycle of the learning rate,
    smoothed labels, an average of the weights."""
    return replace(
        cifar10_resnet18(),
        name="cifar10-fast",
        data=DataConfig(dataset="cifar10", batch_size=256, validation=0.1),
        optim=OptimConfig(lr=0.4, weight_decay=5e-4),
        schedule=ScheduleConfig(epochs=15, sizes=(16, 24, 32, 32)),
        loss=LossConfig(label_smoothing=0.1),
        ema=0.99,
    )


def _cifar10_augment() -> Augment:
    return Augment(
        size=32, crop="random", padding=4, hflip=0.5, mean=_CIFAR10_MEAN, std=_CIFAR10_STD
    )


def mnistm_resnet18() -> Recipe:
    """The first half of a ResNet-18 on MNIST-M at 64 x 64. Ours: mean and standard deviation."""
    return Recipe(
        name="mnistm-resnet18",
        data=DataConfig(
            dataset="mnist-m", layout="mnist-m", batch_size=256, validation=15_000 / 70_000
        ),
        augment=Augment(size=64, mean=(0.5,), std=(0.5,)),
        model=ModelConfig(name="resnet18_truncated"),
        optim=OptimConfig(kind="adam", lr=1e-3, weight_decay=5e-4, decay_all=True),
        schedule=ScheduleConfig(epochs=50, kind="exponential", gamma=0.911, warmup=0.0),
    )


def butterflies_vgg19() -> Recipe:
    """VGG19 with batch norm on 100 classes of butterflies and moths at 224 x 224, pixels in 0..1.

    Ours: the batch size, momentum and weight decay.
    """
    return Recipe(
        name="butterflies-vgg19",
        data=DataConfig(dataset="butterflies", batch_size=32, validation=None),
        augment=Augment(size=224, hflip=0.25, vflip=0.25, right_angles=(0.15, 0.15, 0.15)),
        model=ModelConfig(name="vgg19_bn"),
        optim=OptimConfig(lr=1e-3, nesterov=False, weight_decay=5e-4, decay_all=True),
        schedule=ScheduleConfig(epochs=50, kind="constant", warmup=0.0),
    )


def butterflies_resnet50() -> Recipe:
    """The same with a ResNet-50 in which every block has a projection."""
    return replace(
        butterflies_vgg19(),
        name="butterflies-resnet50",
        model=ModelConfig(name="resnet50_projection"),
    )


def retinopathy_resnet18() -> Recipe:
    """ResNet-18 on the photographs of Kaggle's Diabetic Retinopathy Detection (2015) at 512 x 512.

    Three quarters of them are of grade 0, so the best epoch is that of the highest kappa. Ours: a
    share of the training images, whole patients, to choose it.
    """
    return Recipe(
        name="retinopathy-resnet18",
        data=DataConfig(dataset="retinopathy", layout="retinopathy", batch_size=16, validation=0.1),
        augment=Augment(
            size=512,
            hflip=0.5,
            vflip=0.5,
            rotation=30,
            mean=(0.3749, 0.2601, 0.1856),
            std=(0.2526, 0.1780, 0.1291),
        ),
        model=ModelConfig(name="resnet18"),
        optim=OptimConfig(lr=1e-3, nesterov=False, weight_decay=5e-4, decay_all=True),
        schedule=ScheduleConfig(epochs=20, kind="constant", warmup=0.0),
        evaluation=EvaluationConfig(select="kappa", ordinal=True),
    )


def retinopathy_resnet50() -> Recipe:
    """The same with a ResNet-50."""
    return replace(
        retinopathy_resnet18(), name="retinopathy-resnet50", model=ModelConfig(name="resnet50")
    )


def retinopathy_lab3_resnet18() -> Recipe:
    """ResNet-18 whose last layer sees where things are, on the same photographs in -1..1: the third
    laboratory of a course.

    The learning rate is that from scratch; from pretrained weights the course's is 1e-5. Ours: the
    optimiser.
    """
    return replace(
        retinopathy_resnet18(),
        name="retinopathy-lab3-resnet18",
        data=DataConfig(dataset="retinopathy", layout="retinopathy", batch_size=4, validation=0.1),
        augment=Augment(size=512, hflip=0.5, vflip=0.5, value_range=(-1.0, 1.0)),
        model=ModelConfig(name="resnet18", head="lab3"),
        optim=OptimConfig(kind="adam", lr=1e-4, weight_decay=0.0),
        schedule=ScheduleConfig(epochs=10, kind="constant", warmup=0.0),
    )


def retinopathy_lab3_resnet50() -> Recipe:
    """The same with a ResNet-50, for two epochs less."""
    return replace(
        retinopathy_lab3_resnet18(),
        name="retinopathy-lab3-resnet50",
        model=ModelConfig(name="resnet50", head="lab3"),
        schedule=ScheduleConfig(epochs=8, kind="constant", warmup=0.0),
    )


def retinopathy_kappa() -> Recipe:
    """Our own: ResNet-50 that is trained on the grade as a number, its thresholds chosen for kappa,
    tested on the mean over flips.

    Meant for photographs that ``fastresnet dataset prepare --crop-border`` has freed from what is
    dark around them, and for ``--pretrained``. ``evaluation.two_eyes=true`` grades a patient's eyes
    together.
    """
    return replace(
        retinopathy_resnet50(),
        name="retinopathy-kappa",
        augment=Augment(
            size=512,
            hflip=0.5,
            vflip=0.5,
            rotation=180,
            zoom=(0.9, 1.1),
            brightness=0.1,
            contrast=0.1,
            saturation=0.1,
            mean=(0.3749, 0.2601, 0.1856),
            std=(0.2526, 0.1780, 0.1291),
        ),
        optim=OptimConfig(kind="adamw", lr=3e-4, weight_decay=1e-2, clip_norm=1.0),
        schedule=ScheduleConfig(epochs=20, kind="cosine", warmup=0.05),
        loss=LossConfig(kind="regression"),
        evaluation=EvaluationConfig(select="kappa", ordinal=True, flips=True),
        ema=0.999,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10-simplecnn": cifar10_simplecnn,
    "cifar10-resnet18": cifar10_resnet18,
    "cifar10-fast": cifar10_fast,
    "mnistm-resnet18": mnistm_resnet18,
    "butterflies-vgg19": butterflies_vgg19,
    "butterflies-resnet50": butterflies_resnet50,
    "retinopathy-resnet18": retinopathy_resnet18,
    "retinopathy-resnet50": retinopathy_resnet50,
    "retinopathy-lab3-resnet18": retinopathy_lab3_resnet18,
    "retinopathy-lab3-resnet50": retinopathy_lab3_resnet50,
    "retinopathy-kappa": retinopathy_kappa,
}
