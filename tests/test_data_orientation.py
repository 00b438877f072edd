# SPDX-License-Identifier: Apache-2.0
"""EXIF orientations as geometry: the same as turning the pixels."""

from __future__ import annotations

import numpy as np
import pytest

from fastresnet.data.decode import upright
from fastresnet.data.orientation import is_transposed, to_stored


@pytest.mark.parametrize("orientation", range(1, 9))
def test_positions_lead_to_the_pixels_that_upright_puts_there(orientation: int) -> None:
    stored = np.arange(5 * 8).reshape(5, 8, 1)
    turned = upright(stored, orientation)
    assert (turned.shape[:2] == (8, 5)) == is_transposed(orientation)
    matrix = to_stored(orientation, height=5, width=8)
    for row, column in np.ndindex(turned.shape[:2]):
        x, y = matrix @ [column + 0.5, row + 0.5, 1]
        assert stored[int(y), int(x)] == turned[row, column]
        assert (x % 1, y % 1) == (0.5, 0.5)
