# SPDX-License-Identifier: Apache-2.0
"""The memory that results on the CPU lie in.

Results of 128 KiB and more are kept in a range of memory of the library's own and used again by
later ones: mapping and clearing fresh pages in each step of a training would cost time. The range
grows to the most that was ever alive at once and stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _extension

__all__ = ["empty_images", "release_memory"]


def release_memory() -> int:
    """Gives the memory that no tensor uses at the moment back to the system, as
    :func:`torch.cuda.empty_cache` does on a GPU; later results take it anew.

    Returns:
        How many bytes were given back, at most; 0 where the library's kernels are not active.
    """
    return torch.ops.fastresnet.release_memory() if _extension.cpu_missing is None else 0


def empty_images(batch: int, channels: int, size: tuple[int, int], *, dtype: torch.dtype) -> Tensor:
    """Uninitialised images [batch, channels, *size] in channels_last, in the memory of results."""
    if _extension.cpu_missing is None:
        return torch.ops.fastresnet.empty_images(batch, channels, *size, dtype)
    return torch.empty((batch, channels, *size), dtype=dtype, memory_format=torch.channels_last)
