# SPDX-License-Identifier: Apache-2.0
"""Photographs to time loaders on: fundus-like pictures, made from a seed, as JPEG files.

A bright disc on black with vessels, texture at several scales and sensor noise. The noise is what
decides a JPEG's size: at quality 90 a picture of 3504 x 2336 takes about 1 MB, as those of the
Kaggle Diabetic Retinopathy set do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

QUALITY = 90
_TISSUE = np.array([200, 100, 45], dtype=np.float32)
_VESSELS = 14
_NOISE = 3.0  # standard deviation, in grey levels


def write(folder: Path, *, count: int, width: int, height: int) -> list[Path]:
    """Writes ``count`` different JPEGs, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.jpeg" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            partial = path.with_suffix(".partial")
            picture = fundus(width, height, seed=number)
            picture.save(partial, "JPEG", quality=QUALITY)
            partial.rename(path)
    return paths


def fundus(width: int, height: int, *, seed: int) -> Image.Image:
    """One picture, 8-bit RGB."""
    generator = np.random.default_rng(seed)
    radius = 0.49 * min(height, width)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    distance = np.hypot(x - width / 2, y - height / 2) / radius
    light = 1.05 - 0.5 * distance**2
    for cells in (16, 64, 256):
        light += _texture(generator, width, height, cells) * 0.06
    light *= 1 - 0.45 * _vessels(generator, width, height, radius)
    light += generator.standard_normal((height, width), dtype=np.float32) * _NOISE / 100
    pixels = light[..., None] * _TISSUE * np.clip((1 - distance) * radius / 3, 0, 1)[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _texture(generator: np.random.Generator, width: int, height: int, cells: int) -> np.ndarray:
    coarse = generator.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _vessels(generator: np.random.Generator, width: int, height: int, radius: float) -> np.ndarray:
    """How much of a vessel there is at each pixel, 0 to 1."""
    picture = Image.new("L", (width, height))
    draw = ImageDraw.Draw(picture)
    for _ in range(_VESSELS):
        place = np.array([width / 2 + 0.45 * radius, height / 2])
        heading, thickness = generator.uniform(0, 2 * np.pi), generator.uniform(0.01, 0.02)
        for _ in range(60):
            step = radius / 28 * np.array([np.cos(heading), np.sin(heading)])
            draw.line([*place, *(place + step)], fill=255, width=max(int(thickness * radius), 1))
            place, thickness = place + step, thickness * 0.97
            heading += generator.normal(0, 0.18)
    blurred = picture.filter(ImageFilter.GaussianBlur(max(1, radius / 700)))
    return np.asarray(blurred, dtype=np.float32) / 255
