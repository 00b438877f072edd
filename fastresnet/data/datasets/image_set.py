# SPDX-License-Identifier: Apache-2.0
"""What a data set that lives whole in memory is: images, labels, class names, and its source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastresnet.data.datasets.errors import DatasetError


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels, in one order.

    ``images`` is uint8 [N, H, W, C] and ``labels`` int64 [N], both contiguous on the CPU.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DatasetError(
                f"expected images as uint8 [N, H, W, C], got {self.images.dtype} "
                f"{list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DatasetError(
                f"expected labels as int64 [{len(self.images)}], got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at ``indices`` (int64 [K]), copied, in that order."""
        return ImageSet(self.images[indices], self.labels[indices])

    def split(self, share: float, *, seed: int) -> tuple[ImageSet, ImageSet]:
        """Holds out a share of the images, drawn by ``seed``: returns (the rest, the held out)."""
        held_out = round(share * len(self))
        if not 0 < held_out < len(self):
            raise DatasetError(
                f"expected a share that leaves images on both sides, got {share:g} of "
                f"{len(self)} images"
            )
        # Sorted, so that both parts keep the order of the files and only membership is random.
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(self))
        rest, held = np.sort(order[held_out:]), np.sort(order[:held_out])
        return self.subset(torch.from_numpy(rest)), self.subset(torch.from_numpy(held))


@dataclass(frozen=True)
class ImageDataset:
    """A training and a test part with the names of their classes.

    ``source`` says in words where the images came from: a folder or a package.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        for part, image_set in self.parts.items():
            check_labels(image_set.labels, self.classes, source=self.source, part=part)

    @property
    def parts(self) -> dict[str, ImageSet]:
        """Both parts by name: "train" and "test"."""
        return {"train": self.train, "test": self.test}

    @property
    def channels(self) -> int:
        """Channels of an image: 1 for grey, 3 for colour."""
        return self.train.images.shape[3]


def check_labels(labels: Tensor, classes: tuple[str, ...], *, source: str, part: str) -> None:
    """Checks that a part of a data set has images, and that their labels name classes."""
    name = "training" if part == "train" else part
    if len(labels) == 0:
        raise DatasetError(f"{source}: the {name} part holds no image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise DatasetError(
            f"{source}: expected {name} labels in 0..{len(classes) - 1}, got {low}..{high}"
        )
