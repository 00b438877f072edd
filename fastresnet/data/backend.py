# SPDX-License-Identifier: Apache-2.0
"""What a backend does: files in, batches out. The loader chooses the files and their numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastresnet.data.augment import Augment
from fastresnet.memory import empty_images

# Takes a file's index, bytes and row of random numbers; raises ImageError if it cannot be used.
Use = Callable[[int, bytes, np.ndarray], None]


class Slot(Protocol):
    """A place in a batch: finds a usable file for it, gives it to ``use``, and returns its index in
    the set; None where the place stays black."""

    def __call__(self, use: Use) -> int | None: ...


class Backend(ABC):
    """Turns files into batches as an :class:`Augment` says."""

    name: str

    @abstractmethod
    def batches(
        self,
        requests: Iterable[list[Slot]],
        augment: Augment,
        *,
        size: tuple[int, int],
        dtype: torch.dtype,
        pinned: bool,
    ) -> Iterator[tuple[Tensor, list[int | None]]]:
        """One batch for each request: images [B, 3, H, W] in channels_last, black slots undefined,
        and what each slot returned.

        Args:
            requests: the slots of each batch.
            augment: what is done to an image.
            size: height and width of the result.
            dtype: of the images, float32 or bfloat16.
            pinned: put them into page-locked memory, from which a GPU copies.
        """


class PooledBackend(Backend):
    """A backend that makes one image at a time, on several threads.

    Args:
        workers: threads.
        prefetch: batches in the making besides the one that is being used.
    """

    def __init__(self, *, workers: int, prefetch: int) -> None:
        if workers < 1 or prefetch < 0:
            raise ValueError(
                f"expected at least one worker and a prefetch of at least 0, got {workers} and "
                f"{prefetch}"
            )
        self._workers = workers
        self._prefetch = prefetch

    @abstractmethod
    def load(self, data: bytes, numbers: np.ndarray, augment: Augment, out: Tensor) -> None:
        """Makes one image.

        Args:
            data: the file.
            numbers: float64 [13], its random numbers.
            augment: what is done to it.
            out: [1, 3, H, W] in channels_last; filled.

        Raises:
            ImageError: the file cannot be used; ``out`` is undefined.
        """

    def batches(
        self,
        requests: Iterable[list[Slot]],
        augment: Augment,
        *,
        size: tuple[int, int],
        dtype: torch.dtype,
        pinned: bool,
    ) -> Iterator[tuple[Tensor, list[int | None]]]:
        def begin(slots: list[Slot]) -> tuple[Tensor, list[Future]]:
            if pinned:
                images = torch.empty((len(slots), *size, 3), dtype=dtype, pin_memory=True)
                images = images.permute(0, 3, 1, 2)
            else:
                images = empty_images(len(slots), 3, size, dtype=dtype)
            return images, [
                pool.submit(slot, use(images[place : place + 1]))
                for place, slot in enumerate(slots)
            ]

        def use(out: Tensor) -> Use:
            return lambda _index, data, numbers: self.load(data, numbers, augment, out)

        pool = ThreadPoolExecutor(self._workers, thread_name_prefix=f"fastresnet-{self.name}")
        requests = iter(requests)
        try:
            ahead = deque(begin(slots) for slots in islice(requests, self._prefetch + 1))
            while ahead:
                images, slots = ahead.popleft()
                indices = [slot.result() for slot in slots]
                ahead.extend(begin(slots) for slots in islice(requests, 1))
                yield images, indices
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
