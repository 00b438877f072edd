# SPDX-License-Identifier: Apache-2.0
"""The description of an augmentation: what is drawn, and where that puts an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from fastresnet.data import Augment
from fastresnet.data.augment import NUMBERS, choose, colour_matrices, draw, turns

SIDES = np.array([[40, 60]])


def choices(augment: Augment, count: int = 2000, sides: np.ndarray = SIDES, seed: int = 0):
    numbers = draw(count, seed=seed, epoch=0)
    return choose(augment, np.broadcast_to(sides, (count, 2)), numbers)


def test_numbers_depend_on_seed_and_epoch_alone_and_are_even() -> None:
    numbers = draw(20_000, seed=1, epoch=2)
    assert numbers.shape == (20_000, NUMBERS)
    assert np.array_equal(numbers[:7], draw(7, seed=1, epoch=2))
    for other in (draw(7, seed=2, epoch=2), draw(7, seed=1, epoch=1)):
        assert not np.isin(other, numbers[:7]).any()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Five standard deviations of the mean of a column, and of the product of two.
    assert abs(numbers.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 20_000)
    correlation = np.corrcoef(numbers.T) - np.eye(NUMBERS)
    assert abs(correlation).max() < 5 / np.sqrt(20_000)


def test_central_crop_is_that_of_resize_and_center_crop() -> None:
    (box,) = choices(Augment(size=20), 1).boxes
    assert box.tolist() == [10, 0, 50, 40]  # the square of the short side
    (box,) = choices(Augment(size=20, resize=25), 1).boxes
    assert box.tolist() == [14, 4, 46, 36]
    (box,) = choices(Augment(size=(20, 40)), 1, np.array([[40, 200]])).boxes
    assert box.tolist() == [60, 0, 140, 40]
    (box,) = choices(Augment(size=20, crop="whole"), 1).boxes
    assert box.tolist() == [0, 0, 60, 40]


def test_crop_beyond_the_image_is_centred() -> None:
    (box,) = choices(Augment(size=32, resize=28), 1, np.array([[28, 28]])).boxes
    assert box.tolist() == [-2, -2, 30, 30]
    random = choices(Augment(size=32, resize=28, crop="random"), 5, np.array([[28, 28]]))
    assert (random.boxes == [-2, -2, 30, 30]).all()


def test_random_crop_takes_every_place_of_the_padded_image_evenly() -> None:
    augment = Augment(size=8, resize=8, crop="random", padding=2)
    boxes = choices(augment, 25_000, np.array([[8, 8]])).boxes
    assert (boxes[:, 2:] - boxes[:, :2] == 8).all()
    places, counts = np.unique(boxes[:, :2], axis=0, return_counts=True)
    assert places.tolist() == [[x, y] for x in range(-2, 3) for y in range(-2, 3)]
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_random_resized_crop_stays_inside_with_the_drawn_area_and_ratio() -> None:
    augment = Augment(size=16, crop="random-resized", area=(0.2, 0.5), ratio=(0.8, 1.25))
    boxes = choices(augment, sides=np.array([[400, 600]])).boxes
    extent = boxes[:, 2:] - boxes[:, :2]
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, 2:] <= [600, 400]).all()
    area, ratio = extent.prod(axis=1) / 240_000, extent[:, 0] / extent[:, 1]
    assert 0.195 < area.min() < 0.21
    assert 0.49 < area.max() < 0.505
    assert 0.79 < ratio.min() < 0.81
    assert 1.24 < ratio.max() < 1.26
    assert np.array_equal(boxes, np.rint(boxes))


def test_probabilities_of_flips_and_right_angles() -> None:
    drawn = choices(Augment(size=8, hflip=0.25, vflip=0.75, right_angles=(0.1, 0.2, 0.3)), 40_000)
    # Five standard deviations of a share of 40,000.
    assert abs(drawn.hflips.mean() - 0.25) < 0.011
    assert abs(drawn.vflips.mean() - 0.75) < 0.011
    shares = np.bincount(drawn.quarters, minlength=4) / 40_000
    assert abs(shares - [0.4, 0.1, 0.2, 0.3]).max() < 0.0125
    never = choices(Augment(size=8))
    assert not (never.hflips | never.vflips | (never.quarters > 0)).any()
    always = choices(Augment(size=8, hflip=1, vflip=1, right_angles=(0, 1, 0)))
    assert (always.hflips & always.vflips & (always.quarters == 2)).all()


def test_angles_zooms_and_factors_fill_their_ranges() -> None:
    drawn = choices(
        Augment(
            size=8, rotation=30, zoom=(0.5, 2), brightness=0.4, contrast=2, saturation=0.1, hue=0.5
        ),
        20_000,
    )
    for values, low, high in (
        (drawn.angles, -30, 30),
        (np.log2(drawn.zooms), -1, 1),
        (drawn.brightness, 0.6, 1.4),
        (drawn.contrast, 0, 3),
        (drawn.saturation, 0.9, 1.1),
        (drawn.hues, -0.5, 0.5),
    ):
        slack = (high - low) / 1000
        assert low <= values.min() < low + slack
        assert high - slack < values.max() <= high


def turned_by_grid(image: torch.Tensor, turn: np.ndarray) -> torch.Tensor:
    """The image [C, H, W] sampled where the matrix says, bilinear, black outside."""
    height, width = image.shape[1:]
    y, x = np.mgrid[:height, :width] + 0.5
    source = turn[:, :2] @ np.stack([x.ravel(), y.ravel()]) + turn[:, 2:]
    grid = torch.from_numpy(source.T / [width / 2, height / 2] - 1).view(1, height, width, 2)
    return F.grid_sample(
        image[None].double(), grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )[0]


@pytest.mark.parametrize("size", [(24, 24), (20, 31)])
def test_turn_is_torchvisions_flips_and_rotations_in_one(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, *size, generator=generator)
    right_angles = (0.3, 0.2, 0.3) if size[0] == size[1] else (0, 0.5, 0)
    augment = Augment(
        size=size, hflip=0.5, vflip=0.5, right_angles=right_angles, rotation=40, zoom=(0.7, 1.5)
    )
    drawn = choices(augment, 25)
    for place, turn in enumerate(turns(drawn, size=size)):
        expected = image
        if drawn.hflips[place]:
            expected = V.horizontal_flip(expected)
        if drawn.vflips[place]:
            expected = V.vertical_flip(expected)
        expected = torch.rot90(expected, int(drawn.quarters[place]), (1, 2))
        expected = V.affine(
            expected,
            angle=-drawn.angles[place],
            translate=[0, 0],
            scale=drawn.zooms[place],
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(turned_by_grid(image, turn).float(), expected, atol=2e-5, rtol=0)


def test_flips_and_quarters_alone_hit_pixels_exactly() -> None:
    augment = Augment(size=9, hflip=0.5, vflip=0.5, right_angles=(0.25, 0.25, 0.25))
    for turn in turns(choices(augment, 50), size=(9, 9)):
        assert set(np.abs(turn[:, :2]).ravel()) == {0.0, 1.0}
        assert set(turn[:, 2]) <= {0.0, 9.0}


def test_colour_of_brightness_and_saturation_is_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 5, 5, generator=generator, dtype=torch.float64)
    drawn = choices(Augment(size=8, brightness=0.5, saturation=0.9), 20)
    for place, matrix in enumerate(torch.from_numpy(colour_matrices(drawn)).double()):
        changed = torch.einsum("rc,chw->rhw", matrix[:, :3], image) + matrix[:, 3, None, None]
        grey = V.rgb_to_grayscale(image)
        factor = drawn.saturation[place]
        expected = (image * factor + grey * (1 - factor)) * drawn.brightness[place]
        # torchvision's luma has four digits: 0.2989 for 0.299.
        torch.testing.assert_close(changed, expected, atol=1e-3, rtol=0)


def test_colour_keeps_grey_grey_and_contrast_turns_about_the_middle() -> None:
    drawn = choices(Augment(size=8, contrast=0.8, saturation=0.5, hue=0.5), 20)
    matrices = colour_matrices(drawn)
    for value in (0.0, 0.25, 0.5, 1.0):
        grey = matrices[:, :, :3].sum(axis=2) * value + matrices[:, :, 3]
        expected = 0.5 + (value - 0.5) * drawn.contrast
        np.testing.assert_allclose(grey, np.tile(expected[:, None], 3), atol=1e-6)


def test_hue_of_a_third_of_a_turn_thrice_is_none() -> None:
    drawn = choices(Augment(size=8, hue=0.5), 1)._replace(hues=np.array([1 / 3]))
    matrix = colour_matrices(drawn)[0, :, :3]
    np.testing.assert_allclose(np.linalg.matrix_power(matrix, 3), np.eye(3), atol=1e-5)
    assert abs(matrix - np.eye(3)).max() > 0.5


def test_positive_hue_takes_red_towards_yellow_as_torchvision_does() -> None:
    drawn = choices(Augment(size=8, hue=0.5), 1)._replace(hues=np.array([1 / 12]))
    red, green, blue = colour_matrices(drawn)[0, :, :3] @ [1, 0, 0]
    assert red > green > blue
    wanted = V.adjust_hue(torch.tensor([1.0, 0, 0]).view(3, 1, 1), 1 / 12).flatten()
    assert wanted[0] > wanted[1] > wanted[2]


def test_evaluation_draws_nothing() -> None:
    augment = Augment(
        size=8,
        crop="random",
        padding=4,
        hflip=1,
        vflip=1,
        right_angles=(1, 0, 0),
        rotation=90,
        zoom=(2, 3),
        brightness=1,
        contrast=1,
        saturation=1,
        hue=0.5,
        mean=(0.3,),
        std=(0.1,),
    ).evaluation()
    drawn = choices(augment, 50)
    assert len(np.unique(drawn.boxes, axis=0)) == 1
    assert not augment.changes_colour
    assert not augment.turns
    assert (turns(drawn, size=(8, 8)) == [[1, 0, 0], [0, 1, 0]]).all()
    np.testing.assert_allclose(colour_matrices(drawn), np.eye(3, 4)[None].repeat(50, 0), atol=1e-6)
    assert (augment.mean, augment.std) == ((0.3,), (0.1,))


def test_normalisation_maps_black_and_white() -> None:
    scale, shift = Augment(size=8, value_range=(-1, 1)).normalisation(3)
    np.testing.assert_allclose([shift, 255 * scale + shift], [[-1] * 3, [1] * 3], rtol=1e-6)
    scale, shift = Augment(size=8, mean=(0.5, 0.25), std=(0.5, 0.25)).normalisation(2)
    np.testing.assert_allclose([shift, 255 * scale + shift], [[-1, -1], [1, 3]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"a mean for each of 3 channels, got \(0.5, 0.25\)"):
        Augment(size=8, mean=(0.5, 0.25), std=(0.5, 0.25)).normalisation(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "a size of at least 1, got 0"),
        ({"resize": 0}, "a resize of at least 1, got 0"),
        ({"crop": "middle"}, "a crop among center, random, random-resized, whole, got middle"),
        ({"padding": -1}, "a padding of at least 0, got -1"),
        ({"padding": 2}, 'crop="random" where there is padding, got center'),
        ({"area": (0, 1)}, r"an area as \(least, most\) in 0..1, got \(0, 1\)"),
        ({"ratio": (2, 1)}, r"a ratio as \(least, most\) above 0, got \(2, 1\)"),
        ({"zoom": (0, 1)}, r"a zoom as \(least, most\) above 0, got \(0, 1\)"),
        ({"hflip": 1.5}, "a probability hflip in 0..1, got 1.5"),
        ({"vflip": -0.5}, "a probability vflip in 0..1, got -0.5"),
        ({"right_angles": (0.5, 0.5, 0.5)}, "right_angles of at most 1 together"),
        ({"right_angles": (0.5, 0.5)}, "right_angles as probabilities of 90, 180 and 270"),
        ({"size": (8, 9), "right_angles": (0.5, 0, 0)}, "a square size for rotations by 90"),
        ({"rotation": 200}, "a rotation in 0..180 degrees, got 200"),
        ({"brightness": -1}, "brightness of at least 0, got -1"),
        ({"hue": 0.6}, "a hue in 0..0.5, got 0.6"),
        ({"value_range": (1, 1)}, r"a value range as \(black, white\), got \(1, 1\)"),
        ({"mean": (0.5, 0.5)}, "as many means as standard deviations"),
        ({"std": (0.0,)}, "standard deviations above 0"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"expected {message}"):
        Augment(**{"size": 8, **settings})
