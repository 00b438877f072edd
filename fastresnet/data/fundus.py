# SPDX-License-Identifier: Apache-2.0
"""Photographs of the back of the eye: where the eye is in its black frame, and Graham's colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

_REDUCED = 256  # pixels of the longer side on which the frame is looked for
_CORNER = 0.04  # of a side: what of it is surely frame, if there is a frame at all
_DARK = 40  # a corner brighter than this is not frame
_FEW = 0.03  # of a line: specks in the frame are smaller, every line through the eye is longer
_LEAST = 0.1  # of a side: what is smaller is no eye


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels: from ``left``, ``top`` up to, and without, ``right``, ``bottom``."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Pixels in a row."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Pixels in a column."""
        return self.bottom - self.top


def find_eye(image: Image.Image) -> Box:
    """The smallest box, to within a pixel of an image reduced to 256, that holds all but the frame.

    The frame is what is hardly brighter than the corners, which the reduced image, smoothed, tells
    in spite of noise and specks. Where the corners are not dark, or next to nothing is brighter,
    the whole image is the answer.

    Args:
        image: RGB or RGBX, upright.
    """
    whole = Box(0, 0, image.width, image.height)
    factor = max(max(image.size) // _REDUCED, 1)
    reduced = image.reduce(factor).convert("RGB").filter(ImageFilter.MedianFilter(5))
    light = np.asarray(reduced).max(axis=2).astype(np.int16)
    sides = [max(round(_CORNER * side), 1) for side in light.shape]
    rows, columns = (np.r_[:side, -side:0] for side in sides)
    frame = np.median(light[np.ix_(rows, columns)])
    if frame > _DARK:
        return whole
    eye = light > frame + max(10.0, 0.1 * (np.percentile(light, 95) - frame))
    spans = []
    for axis in (0, 1):
        (places,) = np.nonzero(eye.mean(axis=1 - axis) > _FEW)
        if len(places) == 0 or np.ptp(places) + 1 < _LEAST * eye.shape[axis]:
            return whole
        spans.append((int(places[0]) * factor, (int(places[-1]) + 1) * factor))
    (top, bottom), (left, right) = spans
    return Box(left, top, min(right, image.width), min(bottom, image.height))


def subtract_local_average(
    image: Image.Image, *, centre: tuple[float, float], radius: float
) -> Image.Image:
    """Graham's normalisation (winner of Kaggle's competition, 2015), which evens out the light.

    A pixel becomes 4 * (pixel - local average) + 128, the average being Gaussian with a deviation
    of a thirtieth of the eye's radius; beyond nine tenths of the radius, where the average mixes
    with the frame, everything becomes 128.

    Args:
        image: RGB.
        centre: of the eye, (x, y) in pixels.
        radius: of the eye, in pixels.
    """
    # Pillow's blur is on average within a level of the Gaussian, and rounded, as Graham's was.
    average = np.asarray(image.filter(ImageFilter.GaussianBlur(radius / 30)), dtype=np.int16)
    pixels = 4 * (np.asarray(image, dtype=np.int16) - average) + 128
    y, x = np.ogrid[: image.height, : image.width]
    outside = (x + 0.5 - centre[0]) ** 2 + (y + 0.5 - centre[1]) ** 2 > (0.9 * radius) ** 2
    pixels[outside] = 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
