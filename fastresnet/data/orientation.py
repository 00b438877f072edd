# SPDX-License-Identifier: Apache-2.0
"""EXIF orientations as geometry: positions in the upright image to positions in the stored one.

An orientation (Exif 2.32, tag 0x0112) says how the stored pixels must be flipped and turned to
stand upright; folded into an affine map it costs nothing.
"""

from __future__ import annotations

import numpy as np

# The stored x and y as combinations of the upright x and y: the sign and the order of the axes.
_LINEAR = {
    1: ((1, 0), (0, 1)),
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, 1), (-1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, -1), (1, 0)),
}


def is_transposed(orientation: int) -> bool:
    """Whether the upright image is as wide as the stored one is high."""
    return orientation >= 5


def to_stored(orientation: int, *, height: int, width: int) -> np.ndarray:
    """The affine map, float64 [2, 3], from positions (x, y) in the upright image to positions in
    the stored one, whose size is ``height`` x ``width``."""
    linear = np.array(_LINEAR[orientation], dtype=np.float64)
    # An axis that runs backwards begins at the far end.
    backwards = linear.sum(axis=1) < 0
    return np.column_stack([linear, np.where(backwards, [width, height], 0.0)])
