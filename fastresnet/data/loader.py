# SPDX-License-Identifier: Apache-2.0
"""What every loader is: batches of an epoch, a place in it that can be saved, and a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastresnet.data.augment import Augment, draw
from fastresnet.data.order import Order
from fastresnet.data.transfer import to_device

Batch = tuple[Tensor, Tensor]


class Loader(ABC):
    """Yields (images, labels): [B, C, H, W] in channels_last, and int64 [B].

    In training, every epoch has its own order and its own augmentation, both fixed by (seed,
    epoch); otherwise images come in order and nothing is random. Each image comes exactly once an
    epoch, except that a last batch that is not full may be left out, or with weights as often as
    these say (:class:`Order`); each time it is augmented anew.

    An epoch that was gone through to its end is followed by the next one, unless
    :meth:`set_epoch` chooses another.

    Args:
        order: which images, in which batches.
        augment: what is done to an image; in evaluation, its :meth:`Augment.evaluation`.
        training: augment at random.
        dtype: of the images, float32 or bfloat16.
        device: where the batches go. To a GPU they are copied from page-locked memory, on a stream
            of their own, one batch ahead.
    """

    description: str  # what makes the batches, in words

    def __init__(
        self,
        order: Order,
        augment: Augment,
        *,
        training: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"expected images as float32 or bfloat16, got {dtype}")
        self.order = order
        self.augment = augment if training else augment.evaluation()
        self.training = training
        self.dtype = dtype
        self.device = device
        self._epoch = 0
        self._begin = 0  # the step that the next iterator begins with
        self._position = 0  # steps that the latest iterator has yielded
        self._size = (augment.height, augment.width)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.order)

    @property
    def images_per_epoch(self) -> int:
        """Images that an epoch yields."""
        return self.order.images

    def set_epoch(self, epoch: int, *, image_size: int | None = None) -> None:
        """Chooses the epoch, and the size of its images (default: the augmentation's).

        Another size shows the same crops, resized to it.

        Raises:
            ValueError: ``image_size`` is below 1, or above the augmentation's size.
        """
        full = (self.augment.height, self.augment.width)
        if image_size is None:
            size = full
        elif 1 <= image_size <= min(full):
            size = tuple(round(side * image_size / min(full)) for side in full)
        else:
            raise ValueError(f"expected an image size in 1..{min(full)}, got {image_size}")
        self._epoch, self._begin, self._position, self._size = epoch, 0, 0, size

    def state_dict(self) -> dict[str, int]:
        """Where the latest iteration stands: the epoch, and the batches of it that were yielded."""
        return {"epoch": self._epoch, "step": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration go on behind the batches that the state has counted.

        Raises:
            ValueError: an epoch has not as many batches.
        """
        if not 0 <= state["step"] <= len(self):
            raise ValueError(f"expected a step in 0..{len(self)}, got {state['step']}")
        self._epoch = state["epoch"]
        self._begin = self._position = state["step"]

    def __iter__(self) -> Iterator[Batch]:
        epoch, begin, self._begin = self._epoch, self._begin, 0
        self._position = begin
        numbers = draw(self.order.count, seed=self.order.seed, epoch=epoch)
        places = self.order.batches(epoch, begin=begin)
        batches = self._load(epoch, places, self.order.members(epoch), numbers)
        for images, labels in to_device(batches, self.device):
            self._position += 1
            yield images, labels
        if self._epoch == epoch:
            self._epoch, self._position = epoch + 1, 0

    @abstractmethod
    def _load(
        self, epoch: int, batches: Iterator[np.ndarray], members: np.ndarray, numbers: np.ndarray
    ) -> Iterator[Batch]:
        """The batches of these places, int64 [B] each. Each place of the epoch has an image of the
        set, ``members`` (int64 [N]), and a row of ``numbers``, the random ones."""
