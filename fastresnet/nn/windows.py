# SPDX-License-Identifier: Apache-2.0
"""The windows of a max-pool, as the operators take them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .batch_norm import has_hooks


def square_windows(pool: nn.Module) -> dict[str, int] | None:
    """The windows of ``pool`` as the operator's arguments, or None where they are not those of a
    plain pooling in both dimensions alike."""
    if (
        type(pool) is not nn.MaxPool2d
        or has_hooks(pool)
        or pool.return_indices
        or pool.ceil_mode
        or _same_both_ways(pool.dilation) != 1
    ):
        return None
    names = ("kernel_size", "stride", "padding")
    windows = {name: _same_both_ways(getattr(pool, name)) for name in names}
    return None if None in windows.values() else windows


def _same_both_ways(size: Any) -> int | None:
    if isinstance(size, (tuple, list)):
        return size[0] if len(size) == 2 and size[0] == size[1] else None
    return size
