# SPDX-License-Identifier: Apache-2.0
"""What is done to an image on its way to the network: one description for every backend.

:class:`Augment` is the description, :func:`draw` makes an epoch's random numbers, and
:func:`choose` makes of both what is done to each image. Backends carry out exactly that, most of
them as one matrix (:func:`turns`, :func:`colour_matrices`), and draw nothing themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np

from fastresnet.data.order import Stream, random_words

# Luma of ITU-R BT.601, and the chroma axes of YIQ, in which a hue is an angle.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True)
class Augment:
    """An augmentation, in the order in which it is applied.

    1. *Resize and crop*. The image is resized so that its short side is ``resize`` (default: the
       short side of ``size``), framed with ``padding`` black pixels, and a crop of ``size`` is
       taken: at the centre, or for ``crop="random"`` anywhere. Where the image is smaller than the
       crop, the rest is black. ``crop="random-resized"`` takes a part with an area and an aspect
       ratio drawn from ``area`` and ``ratio`` instead (Szegedy et al. 2014, torchvision's
       ``RandomResizedCrop``; a part that does not fit is cut to the image), and
       ``crop="whole"`` squeezes the whole image into ``size``. Bilinear, antialiased.
    2. *Turn*. A horizontal and a vertical flip, a rotation by 90, 180 or 270 degrees, a rotation
       by up to ``rotation`` degrees either way and a zoom, all about the centre; positive is
       counter-clockwise, a zoom above 1 enlarges. Bilinear, black outside.
    3. *Colour*. A rotation of the hue by up to ``hue`` of a full turn (positive from red to yellow)
       and factors drawn from
       ``1 - x .. 1 + x`` of ``saturation``, ``contrast`` (about mid-grey) and ``brightness``, as
       one matrix (as DALI's ``color_twist``), clamped once.
    4. *Normalise*. Black to white becomes ``value_range``; then ``(value - mean) / std``.

    Args:
        size: of the result, in pixels: a side, or (height, width).
        resize: the short side of the whole image before the crop, in pixels.
        crop: where the crop is taken.
        padding: black pixels on each side of the resized image; for ``crop="random"`` only.
        area: least and most share of the image's area that a random-resized crop takes.
        ratio: least and most width / height of a random-resized crop.
        hflip, vflip: probabilities.
        right_angles: probabilities of rotations by 90, 180 and 270 degrees.
        rotation: the largest angle, in degrees.
        zoom: least and most.
        brightness, contrast, saturation: 0 or more; the last two for colour images.
        hue: 0 to 0.5.
        value_range: what black and white become before ``mean`` and ``std``.
        mean, std: one value, or one per channel.
    """

    size: int | tuple[int, int]
    resize: int | None = None
    crop: Literal["center", "random", "random-resized", "whole"] = "center"
    padding: int = 0
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.0
    vflip: float = 0.0
    right_angles: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        _expect(min(self.height, self.width) >= 1, "a size of at least 1", self.size)
        _expect(self.resize is None or self.resize >= 1, "a resize of at least 1", self.resize)
        crops = ("center", "random", "random-resized", "whole")
        _expect(self.crop in crops, f"a crop among {', '.join(crops)}", self.crop)
        _expect(self.padding >= 0, "a padding of at least 0", self.padding)
        _expect(
            self.padding == 0 or self.crop == "random",
            'crop="random" where there is padding',
            self.crop,
        )
        low, high = self.area
        _expect(0 < low <= high <= 1, "an area as (least, most) in 0..1", self.area)
        for name in ("ratio", "zoom"):
            low, high = getattr(self, name)
            _expect(0 < low <= high, f"a {name} as (least, most) above 0", getattr(self, name))
        for name in ("hflip", "vflip"):
            probability = getattr(self, name)
            _expect(0 <= probability <= 1, f"a probability {name} in 0..1", probability)
        _expect(
            len(self.right_angles) == 3 and min(self.right_angles) >= 0,
            "right_angles as probabilities of 90, 180 and 270 degrees",
            self.right_angles,
        )
        total = sum(self.right_angles)
        _expect(total <= 1 + 1e-9, "right_angles of at most 1 together", self.right_angles)
        _expect(
            self.height == self.width or self.right_angles[0] + self.right_angles[2] == 0,
            "a square size for rotations by 90 and 270 degrees",
            self.size,
        )
        _expect(0 <= self.rotation <= 180, "a rotation in 0..180 degrees", self.rotation)
        for name in ("brightness", "contrast", "saturation"):
            _expect(getattr(self, name) >= 0, f"{name} of at least 0", getattr(self, name))
        _expect(0 <= self.hue <= 0.5, "a hue in 0..0.5", self.hue)
        low, high = self.value_range
        _expect(low < high, "a value range as (black, white)", self.value_range)
        _expect(
            len(self.mean) == len(self.std) >= 1,
            "as many means as standard deviations",
            (self.mean, self.std),
        )
        _expect(min(self.std) > 0, "standard deviations above 0", self.std)

    @property
    def height(self) -> int:
        """Rows of the result."""
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.size if isinstance(self.size, int) else self.size[1]

    @property
    def changes_colour(self) -> bool:
        """Whether colours are changed at random."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    @property
    def turns(self) -> bool:
        """Whether images are flipped, rotated or zoomed."""
        return max(self.hflip, self.vflip, *self.right_angles, self.rotation) > 0 or self.zoom != (
            1.0,
            1.0,
        )

    def evaluation(self) -> Augment:
        """The same without anything random: random crops become the central one."""
        return replace(
            self,
            crop="whole" if self.crop == "whole" else "center",
            padding=0,
            hflip=0.0,
            vflip=0.0,
            right_angles=(0.0, 0.0, 0.0),
            rotation=0.0,
            zoom=(1.0, 1.0),
            brightness=0.0,
            contrast=0.0,
            saturation=0.0,
            hue=0.0,
        )

    def normalisation(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """The scale and shift, float32 [C] each, that take a pixel in 0..255 to its value.

        Raises:
            ValueError: there is neither one mean nor one for each channel.
        """
        _expect(
            len(self.mean) in (1, channels), f"a mean for each of {channels} channels", self.mean
        )
        black, white = self.value_range
        mean, std = (
            np.broadcast_to(np.float64(values), channels) for values in (self.mean, self.std)
        )
        return (
            ((white - black) / (255 * std)).astype(np.float32),
            ((black - mean) / std).astype(np.float32),
        )


class _Column(IntEnum):
    """What each of an image's random numbers decides."""

    TOP = 0
    LEFT = 1
    AREA = 2
    RATIO = 3
    HFLIP = 4
    VFLIP = 5
    RIGHT_ANGLE = 6
    ROTATION = 7
    ZOOM = 8
    BRIGHTNESS = 9
    CONTRAST = 10
    SATURATION = 11
    HUE = 12


NUMBERS = len(_Column)  # random numbers that an image is given


def draw(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The random numbers of an epoch: float64 [count, 13] in 0..1, one row an image.

    They depend on (seed, epoch, index of the image) and on nothing else: not on the size of the
    batches, their order, the shard, or how far an epoch had got when it was taken up again.
    """
    words = random_words(count * NUMBERS, seed=seed, epoch=epoch, stream=Stream.AUGMENT)
    words = words.reshape(count, NUMBERS)
    return (words >> np.uint64(11)) * 2.0**-53


class Choices(NamedTuple):
    """What is done to each of N images; where a field is an array, it has a row an image.

    ``boxes`` float64 [N, 4] are left, top, right and bottom of the crop in the upright image, in
    whole pixels, possibly outside it. ``hflips`` and ``vflips`` are bool [N]; ``quarters`` int64
    [N] rotations by 90 degrees, ``angles`` float64 [N] further degrees, both counter-clockwise;
    ``zooms`` float64 [N]. ``brightness``, ``contrast`` and ``saturation`` are float64 [N] factors,
    ``hues`` float64 [N] parts of a full turn.
    """

    boxes: np.ndarray
    hflips: np.ndarray
    vflips: np.ndarray
    quarters: np.ndarray
    angles: np.ndarray
    zooms: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hues: np.ndarray


def choose(augment: Augment, sizes: np.ndarray, numbers: np.ndarray) -> Choices:
    """Decides what is done to each image.

    Args:
        sizes: int64 [N, 2], height and width of each image, upright.
        numbers: float64 [N, 13], the images' rows of :func:`draw`.
    """
    quarter = np.searchsorted(
        np.cumsum(augment.right_angles), numbers[:, _Column.RIGHT_ANGLE], side="right"
    )
    brightness, contrast, saturation = (
        np.maximum(1 + (2 * numbers[:, column] - 1) * strength, 0)
        for column, strength in (
            (_Column.BRIGHTNESS, augment.brightness),
            (_Column.CONTRAST, augment.contrast),
            (_Column.SATURATION, augment.saturation),
        )
    )
    return Choices(
        boxes=_boxes(augment, sizes.astype(np.float64), numbers),
        hflips=numbers[:, _Column.HFLIP] < augment.hflip,
        vflips=numbers[:, _Column.VFLIP] < augment.vflip,
        quarters=np.where(quarter == 3, 0, quarter + 1),
        angles=(2 * numbers[:, _Column.ROTATION] - 1) * augment.rotation,
        zooms=np.exp(_between(np.log(augment.zoom), numbers[:, _Column.ZOOM])),
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hues=(2 * numbers[:, _Column.HUE] - 1) * augment.hue,
    )


def turns(choices: Choices, *, size: tuple[int, int]) -> np.ndarray:
    """The way back from the result to the resized crop, float64 [N, 2, 3]: a matrix that takes the
    position of a pixel of the result, (x + 0.5, y + 0.5), to a position in the crop.

    Args:
        size: height and width of both.
    """
    angle = np.deg2rad(choices.angles)
    c, s = np.cos(angle) / choices.zooms, np.sin(angle) / choices.zooms
    # Of whole quarters exactly, so that these move pixels without mixing them.
    cosine = np.array([1.0, 0.0, -1.0, 0.0])[choices.quarters]
    sine = np.array([0.0, 1.0, 0.0, -1.0])[choices.quarters]
    turned = np.empty((len(angle), 2, 2))
    turned[:, 0, 0] = turned[:, 1, 1] = cosine * c - sine * s
    turned[:, 1, 0] = sine * c + cosine * s
    turned[:, 0, 1] = -turned[:, 1, 0]
    turned[:, 0] *= np.where(choices.hflips, -1.0, 1.0)[:, None]
    turned[:, 1] *= np.where(choices.vflips, -1.0, 1.0)[:, None]
    centre = np.array([size[1] / 2, size[0] / 2])
    return np.concatenate([turned, (centre - turned @ centre)[:, :, None]], axis=2)


def colour_matrices(choices: Choices) -> np.ndarray:
    """The change of colour, float32 [N, 3, 4]: a matrix and an offset that take RGB in 0..1 to RGB,
    to be clamped to 0..1."""
    brightness, contrast, saturation = (
        factors[:, None, None]
        for factors in (choices.brightness, choices.contrast, choices.saturation)
    )
    angle = 2 * np.pi * choices.hues
    chroma = np.zeros((len(angle), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = np.cos(angle)
    chroma[:, 1, 2] = np.sin(angle)
    chroma[:, 2, 1] = -chroma[:, 1, 2]
    chroma[:, 1:] *= saturation
    matrix = np.linalg.inv(_YIQ) @ chroma @ _YIQ
    # The rows of a rotation of chroma sum to one: grey stays grey.
    offset = np.broadcast_to(brightness * (1 - contrast) / 2, (len(angle), 3, 1))
    return np.concatenate([matrix * brightness * contrast, offset], axis=2).astype(np.float32)


def _boxes(augment: Augment, sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    if augment.crop == "whole":
        corner, extent = np.zeros_like(sizes), sizes
    elif augment.crop == "random-resized":
        area = _between(augment.area, numbers[:, _Column.AREA]) * sizes.prod(axis=1)
        log_ratio = _between(np.log(augment.ratio), numbers[:, _Column.RATIO])
        extent = np.sqrt(area[:, None] * np.exp(log_ratio[:, None] * np.array([-1.0, 1.0])))
        extent = np.clip(np.rint(extent), 1, sizes)
        # One place more than whole pixels have, so that floor makes all of them equally likely.
        corner = np.floor(numbers[:, [_Column.TOP, _Column.LEFT]] * (sizes - extent + 1))
    else:
        resize = augment.resize or min(augment.height, augment.width)
        pixels = sizes.min(axis=1, keepdims=True) / resize  # of the image, to one of the resized
        extent = np.maximum(np.rint(np.array([augment.height, augment.width]) * pixels), 1)
        room = sizes + np.rint(2 * augment.padding * pixels) - extent
        if augment.crop == "random":
            # In steps of the resized image's pixels: without a resize these are the image's.
            places = np.floor(np.maximum(room, 0) / pixels) + 1
            step = np.floor(numbers[:, [_Column.TOP, _Column.LEFT]] * places)
            corner = np.rint((step - augment.padding) * pixels)
            corner = np.where(room < 0, np.rint((sizes - extent) / 2), corner)
        else:
            corner = np.floor((sizes - extent) / 2)
    top_left, bottom_right = corner, corner + extent
    return np.concatenate([top_left[:, ::-1], bottom_right[:, ::-1]], axis=1)


def _between(bounds: tuple[float, float] | np.ndarray, numbers: np.ndarray) -> np.ndarray:
    low, high = bounds
    return low + (high - low) * numbers


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"expected {expected}, got {got}")
