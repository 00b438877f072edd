# SPDX-License-Identifier: Apache-2.0
"""The CPU backend of our own: decode at a reduced scale, then one warp straight into the batch."""

from __future__ import annotations

import functools
import math
import threading

import numpy as np
import torch
from torch import Tensor

from fastresnet import ops
from fastresnet.data.augment import Augment, choose, colour_matrices, turns
from fastresnet.data.backend import PooledBackend
from fastresnet.data.decode import decode, decoded_size, read_header, reduction
from fastresnet.data.orientation import is_transposed, to_stored

# libjpeg's reduction keeps more of the finest detail than an antialiased resize does. In pictures
# off a camera there is hardly any; in small ones, which have been reduced before, it made up to 2.4
# grey levels (512 to 128 pixels), or 0.7 where at least half of the reduction was left to the warp.
_PHOTOGRAPH = 1000  # short side in pixels from which on a picture counts as off a camera
_SPARE = 2


class NativeBackend(PooledBackend):
    """libjpeg-turbo at the smallest scale that still covers the result, then
    :func:`fastresnet.ops.warp`, which also applies the EXIF orientation."""

    name = "native"

    def __init__(self, *, workers: int, prefetch: int) -> None:
        super().__init__(workers=workers, prefetch=prefetch)
        self._memory = _Memory()

    def load(self, data: bytes, numbers: np.ndarray, augment: Augment, out: Tensor) -> None:
        header = read_header(data)
        upright = (header.upright_height, header.upright_width)
        choices = choose(augment, np.array([upright]), numbers[None])
        size = tuple(out.shape[2:])
        turn = turns(choices, size=size)[0]

        stored = to_stored(header.orientation, height=header.height, width=header.width)
        corners = choices.boxes.reshape(2, 2) @ stored[:, :2].T + stored[:, 2]
        box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
        resized = size[::-1] if is_transposed(header.orientation) else size
        back = to_stored(header.orientation, height=resized[0], width=resized[1])
        turn = back[:, :2] @ turn + np.column_stack([np.zeros((2, 2)), back[:, 2]])

        covering = _cover(header.height, header.width, box, resized)
        height, width = decoded_size(header, covering)
        buffer = self._memory.of(height * width * 4)
        pixels = decode(data, header, min_size=covering, buffer=buffer)
        box /= reduction(header, covering)
        scale, shift = _normalisation(augment)
        ops.warp(
            torch.from_numpy(pixels[None]),
            torch.zeros(1, dtype=torch.int64),
            torch.from_numpy(box[None]),
            torch.tensor([resized]),
            torch.from_numpy(turn[None]),
            size=size,
            scale=scale,
            shift=shift,
            colours=torch.from_numpy(colour_matrices(choices)) if augment.changes_colour else None,
            dtype=out.dtype,
            out=out,
        )


class _Memory(threading.local):
    """What a thread decodes into, image after image: each image's pages need not be new."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, dtype=np.uint8)

    def of(self, count: int) -> np.ndarray:
        """At least ``count`` bytes, as the last image left them."""
        if count > self._bytes.size:
            # From this size on numpy asks for large pages.
            self._bytes = np.empty(max(count, 4 << 20), dtype=np.uint8)
        return self._bytes


@functools.lru_cache(maxsize=8)  # not each image's anew
def _normalisation(augment: Augment) -> tuple[Tensor, Tensor]:
    scale, shift = augment.normalisation(3)
    return torch.from_numpy(scale), torch.from_numpy(shift)


def _cover(height: int, width: int, box: np.ndarray, resized: tuple[int, int]) -> tuple[int, int]:
    """The least size of the whole image at which the box may be decoded."""
    across, down = box[2] - box[0], box[3] - box[1]
    spare = _SPARE if min(height, width) < _PHOTOGRAPH else 1
    return (
        math.ceil(spare * height * resized[0] / down),
        math.ceil(spare * width * resized[1] / across),
    )
