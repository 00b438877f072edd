# SPDX-License-Identifier: Apache-2.0
"""A loader for sets that fit in memory: no files, no workers, one operator a batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastresnet import ops
from fastresnet.data.augment import Augment, choose, colour_matrices, turns
from fastresnet.data.datasets.image_set import ImageSet
from fastresnet.data.loader import Batch, Loader
from fastresnet.data.order import Order


class TensorLoader(Loader):
    """Batches of an :class:`ImageSet`; see :class:`Loader`.

    Args:
        image_set: the images; they are kept on ``device``.
        augment: what is done to an image.
        batch_size: images in a batch.
        training: shuffle and augment at random.
        seed: the seed of order and augmentation.
        drop_last: leave out a last batch of fewer than ``batch_size`` images.
        shard, num_shards: which part of each step's images is this loader's (:class:`Order`).
        weights: how often each image comes, relative to the others (:class:`Order`).
        dtype: of the images, float32 or bfloat16.
        device: where the images are kept and augmented.
    """

    def __init__(
        self,
        image_set: ImageSet,
        augment: Augment,
        *,
        batch_size: int,
        training: bool,
        seed: int = 0,
        drop_last: bool = False,
        shard: int = 0,
        num_shards: int = 1,
        weights: np.ndarray | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        order = Order(
            len(image_set),
            batch_size,
            shuffle=training,
            seed=seed,
            drop_last=drop_last,
            shard=shard,
            num_shards=num_shards,
            weights=weights,
        )
        super().__init__(
            order, augment, training=training, dtype=dtype, device=torch.device(device)
        )
        height, width, channels = image_set.images.shape[1:]
        if self.augment.changes_colour and channels != 3:
            raise ValueError(
                f"expected colour images for a change of colour, got {channels} channels"
            )
        self.description = f"in memory, {self.device.type}"
        scale, shift = self.augment.normalisation(channels)
        self._images = image_set.images.to(self.device)
        self._labels = image_set.labels.to(self.device)
        self._scale = torch.from_numpy(scale).to(self.device)
        self._shift = torch.from_numpy(shift).to(self.device)
        self._side = np.array([height, width])

    def _load(
        self, epoch: int, batches: Iterator[np.ndarray], members: np.ndarray, numbers: np.ndarray
    ) -> Iterator[Batch]:
        size = self._size
        for places in batches:
            sides = np.broadcast_to(self._side, (len(places), 2))
            choices = choose(self.augment, sides, numbers[places])
            colours = colour_matrices(choices) if self.augment.changes_colour else None
            index = torch.from_numpy(members[places]).to(self.device)
            images = ops.warp(
                self._images,
                index,
                torch.from_numpy(choices.boxes),
                torch.tensor(size).repeat(len(places), 1),
                torch.from_numpy(turns(choices, size=size)),
                size=size,
                scale=self._scale,
                shift=self._shift,
                colours=None if colours is None else torch.from_numpy(colours),
                dtype=self.dtype,
            )
            yield images, self._labels[index]
