# SPDX-License-Identifier: Apache-2.0
"""A loader for sets of image files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from fastresnet.data.augment import Augment
from fastresnet.data.backend import Backend, Use
from fastresnet.data.datasets.file_set import FileSet
from fastresnet.data.decode import ImageError
from fastresnet.data.faults import Faults, OnError
from fastresnet.data.loader import Batch, Loader
from fastresnet.data.order import Order


class FileLoader(Loader):
    """Batches of a :class:`FileSet`, made by a backend; see :class:`Loader`.

    ``faults`` counts the files that could not be used; ``description`` says what makes the batches.

    Args:
        files: the images and their labels.
        augment: what is done to an image.
        backend: what reads, augments and batches.
        description: the backend in words (default: its name).
        batch_size: images in a batch.
        training: shuffle and augment at random.
        seed: the seed of order and augmentation.
        drop_last: leave out a last batch of fewer than ``batch_size`` images.
        shard, num_shards: which part of each step's images is this loader's (:class:`Order`).
        weights: how often each image comes, relative to the others (:class:`Order`).
        dtype: of the images, float32 or bfloat16.
        device: where the batches go.
        on_error, error_limit: what becomes of files that cannot be used (:class:`Faults`).
    """

    def __init__(
        self,
        files: FileSet,
        augment: Augment,
        *,
        backend: Backend,
        description: str | None = None,
        batch_size: int,
        training: bool,
        seed: int = 0,
        drop_last: bool = False,
        shard: int = 0,
        num_shards: int = 1,
        weights: np.ndarray | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        on_error: OnError = "raise",
        error_limit: float = 0.01,
    ) -> None:
        order = Order(
            len(files),
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
        self.backend = backend
        self.description = description or backend.name
        self.faults = Faults(on_error, count=len(files), limit=error_limit)
        self._files = files
        self._black = torch.from_numpy(augment.normalisation(3)[1]).to(dtype)[:, None, None]

    def _load(
        self, epoch: int, batches: Iterator[np.ndarray], members: np.ndarray, numbers: np.ndarray
    ) -> Iterator[Batch]:
        asked: list[np.ndarray] = []  # batches that the backend has taken up, oldest first

        def requests() -> Iterator[list[partial[int | None]]]:
            for places in batches:
                asked.append(places)
                yield [partial(self._fill, epoch, members, numbers, int(p)) for p in places]

        made = self.backend.batches(
            requests(),
            self.augment,
            size=self._size,
            dtype=self.dtype,
            pinned=self.device.type == "cuda",
        )
        for images, shown in made:
            indices = members[asked.pop(0)]
            if None in shown:
                missing = torch.tensor([index is None for index in shown])
                if self.faults.on_error == "skip":
                    images = images[~missing].contiguous(memory_format=torch.channels_last)
                    shown = [index for index in shown if index is not None]
                else:
                    images[missing] = self._black
                    shown = [
                        int(wanted) if index is None else index
                        for wanted, index in zip(indices, shown, strict=True)
                    ]
            yield images, self._files.labels[torch.tensor(shown, dtype=torch.int64)]

    def _fill(
        self, epoch: int, members: np.ndarray, numbers: np.ndarray, wanted: int, use: Use
    ) -> int | None:
        """A :class:`Slot`: gives the file of the wanted place to ``use``, or another's."""
        for place in self._candidates(epoch, wanted):
            index = int(members[place])
            try:
                use(index, self._files.read(index), numbers[place])
                return index
            except ImageError as error:
                self.faults.report(index, self._files.paths[index], error)
        return None

    def _candidates(self, epoch: int, wanted: int) -> Iterator[int]:
        yield wanted
        if self.faults.on_error == "skip" and self.training:
            # As many as may be unusable, and one: then either one is found, or the limit is met.
            yield from self.order.followers(epoch, wanted, count=self.faults.limit)
