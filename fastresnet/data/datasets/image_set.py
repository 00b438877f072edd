# SPDX-License-Identifier: Apache-2.0
"""What a data set that lives whole in memory is: images, labels, class names, and its source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class DatasetError(ValueError):
    """A data set's files are missing, damaged, or not what their layout promises."""


class DatasetNotFoundError(DatasetError):
    """A data set is not on this machine and cannot be downloaded."""


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
        for part, image_set in (("training", self.train), ("test", self.test)):
            if len(image_set) == 0:
                raise DatasetError(f"{self.source}: the {part} part holds no image")
            low, high = int(image_set.labels.min()), int(image_set.labels.max())
            if low < 0 or high >= len(self.classes):
                raise DatasetError(
                    f"{self.source}: expected {part} labels in 0..{len(self.classes) - 1}, "
                    f"got {low}..{high}"
                )

    @property
    def channels(self) -> int:
        """Channels of an image: 1 for grey, 3 for colour."""
        return self.train.images.shape[3]
