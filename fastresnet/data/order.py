# SPDX-License-Identifier: Apache-2.0
"""Which images an epoch shows, in which order, in which batches, to which shard.

Order and augmentation come from counter-based streams (Philox, Salmon et al. 2011) keyed by
(seed, epoch): nothing has to be remembered to draw them again, so that (epoch, step) is the whole
state of a loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from torch import Tensor


class Stream(IntEnum):
    """Independent streams of random words within one epoch."""

    ORDER = 0
    AUGMENT = 1


def random_words(count: int, *, seed: int, epoch: int, stream: Stream) -> np.ndarray:
    """The first ``count`` words (uint64 [count]) of the Philox stream of (seed, epoch, stream)."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"expected seed and epoch of at least 0, got {seed} and {epoch}")
    key = np.array([seed, epoch * len(Stream) + stream], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def shuffled(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(count)`` (int64 [count]) that depends on (seed, epoch) only."""
    words = random_words(count, seed=seed, epoch=epoch, stream=Stream.ORDER)
    return np.argsort(words, kind="stable")


def balancing_weights(labels: Tensor) -> np.ndarray:
    """Weights for :class:`Order`, float64 [N], with which all labels (int64 [N]) that there are
    come equally often."""
    values = labels.numpy()
    return 1 / np.bincount(values)[values]


@dataclass(frozen=True)
class Order:
    """The batches of one shard.

    An epoch has as many places as there are images, and each image is at one of them. With weights
    an image is at as many places as its share of them says, rounded up or down at random, and
    possibly at none: torch's WeightedRandomSampler with as little left to chance as can be.

    A step takes ``batch_size`` images for each of ``num_shards`` shards from the epoch's order,
    shard by shard: together the shards see at each step what one loader with ``num_shards`` times
    the batch size would. What is left at the end of the epoch is dealt out as evenly as can be, or
    left out with ``drop_last``; a shard may then have a step less than another.

    Args:
        count: images in the set.
        batch_size: images in a shard's batch.
        shuffle: a new order each epoch, or always that of the set.
        seed: of the order.
        drop_last: leave out what does not fill a batch in each shard.
        shard: this one, counted from 0.
        num_shards: how many there are.
        weights: how often an image comes, relative to the others (float [count]); None: as often.

    Raises:
        ValueError: a number is out of its range, ``drop_last`` leaves nothing, or there are weights
            without ``shuffle``.
    """

    count: int
    batch_size: int
    shuffle: bool
    seed: int = 0
    drop_last: bool = False
    shard: int = 0
    num_shards: int = 1
    weights: np.ndarray | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"expected a batch size of at least 1, got {self.batch_size}")
        if not 0 <= self.shard < self.num_shards:
            raise ValueError(
                f"expected a shard in 0..{self.num_shards - 1}, got {self.shard} of "
                f"{self.num_shards}"
            )
        if self.count < 1:
            raise ValueError(f"expected at least one image, got {self.count}")
        if self.drop_last and self.count < self._step:
            raise ValueError(
                f"expected at least one full batch of {self._step} images, got {self.count} "
                "images and drop_last"
            )
        if self.weights is not None:
            self._check_weights(self.weights)

    def _check_weights(self, weights: np.ndarray) -> None:
        if not self.shuffle:
            raise ValueError("expected no weights of images that are not shuffled, got some")
        if weights.shape != (self.count,):
            raise ValueError(
                f"expected a weight for each of {self.count} images, got {list(weights.shape)}"
            )
        if not np.isfinite(weights).all() or weights.min() < 0 or weights.max() <= 0:
            raise ValueError(
                "expected finite weights of at least 0, not all of them 0, got "
                f"{weights.min():g}..{weights.max():g}"
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.count // self._step + (self._rest > 0)

    @property
    def images(self) -> int:
        """Images in an epoch of this shard."""
        return self.count // self._step * self.batch_size + self._rest

    def batches(self, epoch: int, *, begin: int = 0) -> Iterator[np.ndarray]:
        """The places of each batch of an epoch, int64 [batch_size] or, of the last, fewer: the
        indices of their images (without weights), or of what :meth:`members` has for them.

        Args:
            begin: the first batch.
        """
        order = self._epoch(epoch)
        for step in range(begin, len(self)):
            if (step + 1) * self._step <= self.count:
                first, size = step * self._step + self.shard * self.batch_size, self.batch_size
            else:
                left, size = self.count % self._step, self._rest
                each, more = divmod(left, self.num_shards)
                first = step * self._step + self.shard * each + min(self.shard, more)
            yield order[first : first + size]

    def followers(self, epoch: int, index: int, *, count: int) -> Iterator[int]:
        """The places of the up to ``count`` other images that come behind the place ``index`` in an
        epoch's order, the first behind the last."""
        order, members = self._epoch(epoch), self.members(epoch)
        (begin,) = np.flatnonzero(order == index)
        seen = {int(members[index])}
        for step in range(1, self.count):
            place = int(order[(begin + step) % self.count])
            if len(seen) > count:
                return
            if int(members[place]) not in seen:
                seen.add(int(members[place]))
                yield place

    def members(self, epoch: int) -> np.ndarray:
        """The image at each place of an epoch, int64 [count]; without weights, the place itself."""
        if self.weights is None:
            return np.arange(self.count)
        words = random_words(2 * self.count + 1, seed=self.seed, epoch=epoch, stream=Stream.ORDER)
        words = words[self.count :]  # those in front shuffle the places
        # Images in random order side by side, each as wide as its share: the one at each whole
        # number and a random fraction is taken (systematic sampling, Madow & Madow 1944).
        images = np.argsort(words[1:], kind="stable")
        ends = np.cumsum(self.weights[images], dtype=np.float64)
        fraction = (words[0] >> np.uint64(11)) * 2.0**-53
        places = (np.arange(self.count) + fraction) * (ends[-1] / self.count)
        return images[np.searchsorted(ends[:-1], places, side="right")]

    def _epoch(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.count)
        return shuffled(self.count, seed=self.seed, epoch=epoch)

    @property
    def _step(self) -> int:
        return self.batch_size * self.num_shards

    @property
    def _rest(self) -> int:
        """Images of this shard in the step that is not full."""
        if self.drop_last:
            return 0
        each, more = divmod(self.count % self._step, self.num_shards)
        return each + (self.shard < more)
