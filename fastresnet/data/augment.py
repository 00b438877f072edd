# SPDX-License-Identifier: Apache-2.0
"""Augmentation of small images that live whole in memory, as operations on a batch.

:class:`Augment` describes it; :func:`draw` gives one image's random choices a fixed place in a
counter-based stream, so that they depend on (seed, epoch, index of the image) and on nothing
else: not on the batch size, the order of the batches, or what was drawn before.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Zero padding, a crop of ``size`` x ``size``, a horizontal flip, and normalisation.

    In training the crop is at random and the flip is done with probability ``flip``; otherwise
    the crop is the central one and nothing is flipped. ``padding`` pixels are added on each side
    first. ``mean`` and ``std`` (one value, or one per channel) are those of pixels in 0..1.
    """

    size: int = 32
    padding: int = 4
    flip: float = 0.5
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected a size of at least 1, got {self.size}")
        if self.padding < 0:
            raise ValueError(f"expected a padding of at least 0, got {self.padding}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"expected a flip probability in 0..1, got {self.flip}")
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"expected as many means as standard deviations, got {self.mean} and {self.std}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"expected standard deviations above 0, got {self.std}")


class Stream(IntEnum):
    """Independent streams of random words within one epoch."""

    ORDER = 0
    AUGMENT = 1


@dataclass(frozen=True)
class Draw:
    """The random choices for each image: crop corner ``top``, ``left`` (int64 [N]) and ``flip``
    (bool [N])."""

    top: Tensor
    left: Tensor
    flip: Tensor


def random_words(count: int, *, seed: int, epoch: int, stream: Stream) -> np.ndarray:
    """The first ``count`` words (uint64 [count]) of the Philox stream of (seed, epoch, stream)."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"expected seed and epoch of at least 0, got {seed} and {epoch}")
    key = np.array([seed, epoch * len(Stream) + stream], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def shuffled(count: int, *, seed: int, epoch: int) -> Tensor:
    """A permutation of ``range(count)`` (int64 [count]) that depends on (seed, epoch) only."""
    words = random_words(count, seed=seed, epoch=epoch, stream=Stream.ORDER)
    return torch.from_numpy(np.argsort(words, kind="stable"))


def draw(augment: Augment, count: int, *, corners: tuple[int, int], seed: int, epoch: int) -> Draw:
    """Draws the choices for ``count`` images.

    Args:
        corners: in how many places, vertically and horizontally, a crop may begin.
    """
    words = random_words(count, seed=seed, epoch=epoch, stream=Stream.AUGMENT)
    # One word holds three independent fields. Multiply and shift maps 20 bits onto a range
    # without a division; its bias, range / 2**20, is far below what any training can feel.
    fields = [(words >> np.uint64(shift)) & np.uint64(0xFFFFF) for shift in (0, 20, 40)]
    top, left = (
        ((field * np.uint64(places)) >> np.uint64(20)).astype(np.int64)
        for field, places in zip(fields, corners, strict=False)
    )
    flip = fields[2] < np.uint64(round(augment.flip * (1 << 20)))
    return Draw(torch.from_numpy(top), torch.from_numpy(left), torch.from_numpy(flip))


def central(count: int, *, corners: tuple[int, int]) -> Draw:
    """The choices of evaluation: the central crop of each of ``count`` images, no flip."""
    return Draw(
        top=torch.full((count,), (corners[0] - 1) // 2),
        left=torch.full((count,), (corners[1] - 1) // 2),
        flip=torch.zeros(count, dtype=torch.bool),
    )
