# SPDX-License-Identifier: Apache-2.0
"""What a recipe names, made: its data set, loaders and network. The one place where training meets
data and models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastresnet import models
from fastresnet.data import (
    DatasetError,
    FileDataset,
    FileSet,
    ImageDataset,
    ImageSet,
    Loader,
    balancing_weights,
    load_dataset,
    make_loader,
    open_dataset,
)
from fastresnet.data.datasets.registry import PUBLISHED
from fastresnet.data.decode import decode, read_header, upright
from fastresnet.train import ConfigError, Recipe
from fastresnet.train.distributed import World
from fastresnet.train.objective import Objective
from fastresnet.train.two_eyes import other_eyes

Dataset = ImageDataset | FileDataset
ImagePart = ImageSet | FileSet

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Parts:
    """A data set in three."""

    train: ImagePart
    validation: ImagePart
    test: ImagePart


def open_data(recipe: Recipe, folder: Path | None) -> Dataset:
    """The data set of a recipe.

    Args:
        folder: of a published set, where its files are or go; of any other, where it is instead of
            in ``data.dataset``.

    Raises:
        DatasetError: there is none, or it is not as it should be.
    """
    data = recipe.data
    if data.dataset in PUBLISHED and data.layout is None:
        return load_dataset(data.dataset, folder)
    path = folder or Path(data.dataset)
    if folder is None and not path.exists():
        raise DatasetError(
            f"data.dataset: expected one of {', '.join(PUBLISHED)}, or a folder, as --data gives, "
            f"got {data.dataset!r}"
        )
    return open_dataset(path, data.layout, seed=recipe.seed)


def split(recipe: Recipe, dataset: Dataset) -> Parts:
    """The parts to train on, to choose the best epoch by, and to test on.

    Raises:
        DatasetError: the data set has no such part.
    """
    if dataset.test is None:
        raise DatasetError(f"{dataset.source}: expected a test part, got none")
    if recipe.data.validation is not None:
        train, validation = dataset.train.split(recipe.data.validation, seed=recipe.seed)
        return Parts(train, validation, dataset.test)
    validation = getattr(dataset, "validation", None)
    if validation is None:
        raise DatasetError(
            f"{dataset.source}: expected a validation part, got none: set data.validation to the "
            "share of the training images to hold out"
        )
    return Parts(dataset.train, validation, dataset.test)


def build_loader(
    recipe: Recipe, part: ImagePart, *, training: bool, device: torch.device, world: World
) -> Loader:
    """This process's loader of a part."""
    data = recipe.data
    return make_loader(
        part,
        recipe.augment,
        data.batch_size,
        backend=data.backend,
        training=training,
        seed=recipe.seed,
        drop_last=training,
        shard=world.rank,
        num_shards=world.size,
        weights=balancing_weights(part.labels) if training and data.balanced else None,
        dtype=_DTYPES[data.dtype],
        device=device,
        workers=data.workers,
        on_error=data.on_error,
    )


def build_objective(recipe: Recipe, dataset: Dataset, labels: Tensor) -> Objective:
    """The loss of a recipe on training images with these labels."""
    return Objective(recipe.loss, labels, classes=len(dataset.classes))


def build_network(recipe: Recipe, dataset: Dataset, *, outputs: int) -> nn.Module:
    """The network of a recipe, its initial values drawn by the recipe's seed."""
    torch.manual_seed(recipe.seed)
    try:
        model = models.build_model(
            recipe.model.name,
            num_classes=outputs,
            in_channels=dataset.channels if isinstance(dataset, ImageDataset) else 3,
            weights=recipe.model.pretrained,
        )
        if recipe.model.head == "lab3":
            model = models.lab3_head(model, recipe.augment.height, outputs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    return model


def shown(loader: Loader, part: ImagePart) -> Tensor:
    """Which images of a part an evaluation shows, int64 [N]: all but files that were skipped."""
    faults = getattr(loader, "faults", None)
    skipped = faults.files if faults is not None and faults.on_error == "skip" else {}
    return torch.tensor([index for index in range(len(part)) if index not in skipped])


def check_two_eyes(recipe: Recipe, *parts: ImagePart) -> None:
    """Whether the recipe can grade the eyes of a patient together.

    Raises:
        ConfigError: it trains no regression, or nobody knows whose images the parts show.
    """
    if recipe.loss.kind != "regression":
        raise ConfigError(
            "evaluation.two_eyes: expected a regression on the grade (loss.kind=regression), got "
            f"loss.kind={recipe.loss.kind}"
        )
    if any(getattr(part, "groups", None) is None for part in parts):
        raise ConfigError(
            "evaluation.two_eyes: expected a data set that names the patient of each image, as "
            "10_left and 10_right do, got one that does not"
        )


def other_eye(part: FileSet, loader: Loader) -> Tensor:
    """Of the images of ``part`` that an evaluation shows, which one shows the same patient's other
    eye: int64 [N]."""
    return other_eyes(part.groups[shown(loader, part)])


def pixels(part: ImagePart, index: int) -> np.ndarray:
    """An image as it is stored, upright: uint8 [H, W, C]."""
    if isinstance(part, ImageSet):
        return part.images[index].numpy()
    data = part.read(index)
    header = read_header(data)
    return upright(decode(data, header), header.orientation)[:, :, :3]
