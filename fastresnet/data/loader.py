# SPDX-License-Identifier: Apache-2.0
"""A loader for sets that fit in memory: no worker processes, no per-image work.

A batch is one gather of bytes, one select for the flips and one scaled conversion to float32,
laid out as NHWC from the start.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastresnet.data.augment import Augment, central, draw, shuffled
from fastresnet.data.datasets.image_set import ImageSet


class TensorLoader:
    """Yields (images, labels): float32 [B, C, S, S] in channels_last, and int64 [B].

    In training, every epoch has its own order and its own augmentation, both fixed by (seed,
    epoch) and chosen with :meth:`set_epoch`; otherwise images come in order, cropped centrally.
    Each image comes exactly once an epoch, except that ``drop_last`` leaves out a last batch that
    is not full.

    Args:
        image_set: the images; the loader keeps one zero-padded copy of them.
        augment: what is done to an image.
        batch_size: images in a batch.
        training: shuffle and augment at random.
        seed: the seed of order and augmentation.
        drop_last: leave out a last batch of fewer than ``batch_size`` images.
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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
        if drop_last and len(image_set) < batch_size:
            raise ValueError(
                f"expected at least one full batch of {batch_size} images, got {len(image_set)} "
                "images and drop_last"
            )
        height, width, channels = image_set.images.shape[1:]
        if len(augment.mean) not in (1, channels):
            raise ValueError(
                f"expected a mean for each of {channels} channels, got {len(augment.mean)} means"
            )
        padding = augment.padding
        self._corners = tuple(side + 2 * padding - augment.size + 1 for side in (height, width))
        if min(self._corners) < 1:
            raise ValueError(
                f"expected images of at least {augment.size} pixels a side with {padding} of "
                f"padding, got {height}x{width}"
            )
        self._labels = image_set.labels
        self._augment = augment
        self._batch_size = batch_size
        self._training = training
        self._seed = seed
        self._drop_last = drop_last
        self._epoch = 0
        self._image_size = augment.size

        padded = F.pad(image_set.images, (0, 0, padding, padding, padding, padding))
        # Every crop of every image as a view: [N, tops, lefts, S, S, C].
        self._crops = (
            padded.unfold(1, augment.size, 1).unfold(2, augment.size, 1).permute(0, 1, 2, 4, 5, 3)
        )
        mean, std = torch.tensor(augment.mean), torch.tensor(augment.std)
        self._scale = 1 / (255 * std)
        self._shift = -mean / std

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.images_per_epoch, self._batch_size)
        return full + (rest > 0)

    @property
    def images_per_epoch(self) -> int:
        """Images that an epoch yields."""
        count = len(self._labels)
        return count - count % self._batch_size if self._drop_last else count

    def set_epoch(self, epoch: int, *, image_size: int | None = None) -> None:
        """Chooses the epoch, and the size that images are reduced to (default: the crop's).

        Raises:
            ValueError: ``image_size`` is not a whole fraction of the crop's size.
        """
        size = self._augment.size if image_size is None else image_size
        if size < 1 or self._augment.size % size:
            raise ValueError(
                f"expected an image size that divides {self._augment.size}, got {image_size}"
            )
        self._epoch, self._image_size = epoch, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self._labels)
        if self._training:
            order = shuffled(count, seed=self._seed, epoch=self._epoch)
            choices = draw(
                self._augment, count, corners=self._corners, seed=self._seed, epoch=self._epoch
            )
        else:
            order = torch.arange(count)
            choices = central(count, corners=self._corners)
        size = self._image_size
        for begin in range(0, self.images_per_epoch, self._batch_size):
            indices = order[begin : begin + self._batch_size]
            crops = self._crops[indices, choices.top[indices], choices.left[indices]]
            if self._training:
                flip = choices.flip[indices].view(-1, 1, 1, 1)
                crops = torch.where(flip, crops.flip(2), crops)
            yield self._normalise(crops, size), self._labels[indices]

    def _normalise(self, crops: Tensor, size: int) -> Tensor:
        # Permuted from NHWC rather than converted: for one channel torch takes any strides as
        # channels_last, and convolutions would then choose NCHW for the whole network.
        pixels = crops.float()
        window = self._augment.size // size
        if window > 1:
            pixels = pixels.unflatten(1, (size, window)).unflatten(3, (size, window))
            pixels = pixels.mean(dim=(2, 4))
        return torch.addcmul(self._shift, pixels, self._scale).permute(0, 3, 1, 2)
