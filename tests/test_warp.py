# SPDX-License-Identifier: Apache-2.0
"""Crop, resize, turn, colour and normalise as one operator: against torchvision on photographs,
against its twin in float64, on every ISA level, and what it says to bad input."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from fastresnet import _extension, ops
from fastresnet.ops import reference_warp

LEVELS = torch.ops.fastresnet.isa_levels()
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
# Grey levels by which the fixed-point interpolation of a turn may be off, and a resize, which is
# rounded to whole levels once for each direction.
TURN_ERROR = 1 / 32
RESIZE_ERROR = 1.0 + 1 / 16


def rotation(degrees: float, size: tuple[int, int], resized: tuple[int, int], zoom: float = 1.0):
    """From positions in an output of ``size`` to those in a crop, about both centres;
    counter-clockwise as in torchvision, and enlarged by ``zoom``."""
    angle = math.radians(degrees)
    c, s = math.cos(angle) / zoom, math.sin(angle) / zoom
    (h, w), (rh, rw) = size, resized
    return (
        (c, -s, (rw - c * w + s * h) / 2),
        (s, c, (rh - s * w - c * h) / 2),
    )


def arguments(
    images: Tensor,
    box: tuple[float, float, float, float] | None = None,
    resized: tuple[int, int] | None = None,
    turn=IDENTITY,
    *,
    index: int = 0,
    size: tuple[int, int] | None = None,
) -> dict:
    """Those of a call on one image; by default all of it, as it is, in grey levels."""
    height, width = images.shape[1:3]
    box = (0, 0, width, height) if box is None else box
    resized = (round(box[3] - box[1]), round(box[2] - box[0])) if resized is None else resized
    channels = 1 if images.shape[3] == 1 else 3
    return {
        "images": images,
        "index": torch.tensor([index]),
        "boxes": torch.tensor([box], dtype=torch.float64),
        "resized": torch.tensor([resized]),
        "turns": torch.tensor([turn], dtype=torch.float64),
        "size": resized if size is None else size,
        "scale": torch.ones(channels),
        "shift": torch.zeros(channels),
    }


def noise(channels: int, height: int = 20, width: int = 30, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8)


def as_chw(images: Tensor, index: int = 0) -> Tensor:
    """An image as torchvision takes it."""
    image = images[index].permute(2, 0, 1)
    return image[:3] if len(image) == 4 else image


def photographs() -> dict[str, Tensor]:
    """Photographs, RGB [1, H, W, 3]."""
    try:
        from skimage import data

        found = {
            name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "retina")
        }
    except ImportError:
        from sklearn.datasets import load_sample_images

        found = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    return {name: torch.from_numpy(np.ascontiguousarray(v))[None] for name, v in found.items()}


PHOTOGRAPHS = photographs()
BILINEAR = InterpolationMode.BILINEAR


# As v2.functional: (what it makes of a float image [3, H, W], our arguments for it).
def resized_crop(image: Tensor, images: Tensor):
    return v2.resized_crop(image, 11, 23, 257, 301, [128, 96], antialias=True), arguments(
        images, (23, 11, 23 + 301, 11 + 257), (128, 96)
    )


def enlarged(image: Tensor, images: Tensor):
    height, width = 150, 170
    crop = v2.crop(image, 40, 50, height, width)
    return v2.resize(crop, [301, 333], antialias=True), arguments(
        images, (50, 40, 50 + width, 40 + height), (301, 333)
    )


def crop_beyond_the_border(image: Tensor, images: Tensor):
    height, width = image.shape[1:]
    crop = v2.crop(image, -20, 40, height + 50, width)
    return v2.resize(crop, [200, 210], antialias=True), arguments(
        images, (40, -20, 40 + width, height + 30), (200, 210)
    )


def rotated(image: Tensor, images: Tensor):
    size = tuple(image.shape[1:])
    return v2.rotate(image, 23.0, BILINEAR), arguments(images, turn=rotation(23, size, size))


def resized_and_rotated(image: Tensor, images: Tensor):
    small = v2.center_crop(v2.resize(image, [200], antialias=True), [180, 180])
    height, width = v2.resize(image, [200]).shape[1:]
    top, left = round((height - 180) / 2), round((width - 180) / 2)
    y, x = image.shape[1] / height, image.shape[2] / width
    # The crop cuts through pixels, which its box says; resize sees beyond it where the crop
    # does not, so only what lies inside is compared.
    box = (left * x, top * y, (left + 180) * x, (top + 180) * y)
    args = arguments(images, box, (180, 180), rotation(-17, (140, 140), (180, 180)))
    args["size"] = (140, 140)
    return v2.center_crop(v2.rotate(small, -17.0, BILINEAR), [140, 140]), args


def sheared(image: Tensor, images: Tensor):
    height, width = image.shape[1:]
    expected = v2.affine(image, 0.0, [10, -7], 1.3, [0.0, 0.0], BILINEAR)
    ((a, b, c), (d, e, f)) = rotation(0, (height, width), (height, width), zoom=1.3)
    turn = ((a, b, c - 10 / 1.3), (d, e, f + 7 / 1.3))
    return expected, arguments(images, turn=turn)


def flipped(image: Tensor, images: Tensor):
    width = image.shape[2]
    return v2.horizontal_flip(image), arguments(images, turn=((-1, 0, width), (0, 1, 0)))


def flipped_vertically(image: Tensor, images: Tensor):
    height = image.shape[1]
    return v2.vertical_flip(image), arguments(images, turn=((1, 0, 0), (0, -1, height)))


def quarter_turn(image: Tensor, images: Tensor):
    height, width = image.shape[1:]
    turn = rotation(90, (width, height), (height, width))
    return v2.rotate(image, 90.0, expand=True), arguments(images, turn=turn, size=(width, height))


EXACT = (flipped, flipped_vertically, quarter_turn)
TRANSFORMS = (
    resized_crop,
    enlarged,
    crop_beyond_the_border,
    rotated,
    sheared,
    resized_and_rotated,
    *EXACT,
)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
def test_torchvision_on_photographs(transform, name):
    """Ours is from bytes; the truth is torchvision in float64, and what torchvision itself makes of
    bytes the yardstick."""
    images = PHOTOGRAPHS[name]
    exact, args = transform(as_chw(images).double(), images)
    from_bytes, _ = transform(as_chw(images), images)
    value = ops.warp(**args)[0]
    difference = (value.double() - exact).abs()
    if transform in EXACT:
        assert torch.equal(value, exact.float())
        return
    torchs = (from_bytes.double() - exact).abs()
    # torchvision rounds behind a turn too, so its own error is not small.
    assert difference.mean() <= 1.5 * torchs.mean() + TURN_ERROR
    assert difference.mean() < 0.5


# Against the twin in float64.


def error_of(args: dict) -> float:
    """The largest distance in grey levels from the twin in float64."""
    exact = reference_warp.warp(**args, dtype=torch.float64)
    return (ops.warp(**args).double() - exact).abs().max().item()


GEOMETRIES = {
    "whole": {},
    "inside": {"box": (3, 2, 23, 17)},
    "beyond_each_border": {"box": (-5, -4, 37, 29)},
    "outside": {"box": (40, 50, 60, 60)},
    "one_pixel": {"box": (7, 9, 8, 10)},
    "shift": {"turn": ((1, 0, 5), (0, 1, -3))},
    "shift_far_away": {"turn": ((1, 0, 1e6), (0, 1, -1e6))},
    "flip": {"turn": ((-1, 0, 30), (0, 1, 0))},
    "both_flips": {"turn": ((-1, 0, 30), (0, -1, 20))},
    "transposition": {"turn": ((0, 1, 0), (1, 0, 0)), "size": (30, 20)},
    "right_angle": {"turn": rotation(90, (30, 20), (20, 30)), "size": (30, 20)},
    "half_turn": {"turn": rotation(180, (20, 30), (20, 30))},
    "larger_output": {"turn": ((1, 0, -4), (0, 1, -2)), "size": (31, 47)},
    "smaller_output": {"turn": ((1, 0, 4), (0, 1, 2)), "size": (9, 5)},
    "one_pixel_output": {"size": (1, 1)},
}
TURNS = {
    "half_a_pixel": {"turn": ((1, 0, 0.5), (0, 1, 0))},
    "almost_nothing": {"turn": ((1, 0, 1e-9), (0, 1, -1e-9))},
    "small_angle": {"turn": rotation(0.5, (20, 30), (20, 30))},
    "rotation": {"turn": rotation(-37, (20, 30), (20, 30))},
    "rotation_of_a_crop_beyond_the_border": {
        "box": (-4, 3, 31, 23),
        "turn": rotation(20, (20, 35), (20, 35)),
    },
    "zoom_in": {"turn": rotation(10, (20, 30), (20, 30), zoom=7.3)},
    "zoom_out": {"turn": rotation(10, (20, 30), (20, 30), zoom=0.06)},
    "shear": {"turn": ((1, 0.3, -2), (0, 1, 0))},
    "one_point": {"turn": ((0, 0, 7.3), (0, 0, 4.1))},
    "many_groups": {"turn": rotation(3, (40, 300), (20, 30), zoom=10), "size": (40, 300)},
}
RESIZES = {
    "smaller": {"resized": (7, 11)},
    "larger": {"resized": (33, 71)},
    "wider_and_lower": {"resized": (5, 64)},
    "to_one_pixel": {"resized": (1, 1)},
    "from_one_pixel": {"box": (7, 9, 8, 10), "resized": (17, 35)},
    "beyond_each_border": {"box": (-5, -4, 37, 29), "resized": (16, 16)},
    "outside": {"box": (40, 50, 60, 60), "resized": (8, 9)},
    "through_pixels": {"box": (2.25, 1.5, 20.75, 18.125), "resized": (9, 10)},
    "through_pixels_unscaled": {"box": (2.25, 1.5, 22.25, 17.5), "resized": (16, 20)},
    "within_one_pixel": {"box": (2.25, 1.5, 2.5, 1.75), "resized": (4, 4)},
    "then_rotated": {
        "box": (1.5, -2, 27, 22.5),
        "resized": (40, 50),
        "turn": rotation(25, (33, 44), (40, 50)),
        "size": (33, 44),
    },
    "then_part_of_it": {
        "resized": (60, 90),
        "turn": ((1, 0, 30), (0, 1, 20)),
        "size": (11, 13),
    },
    "then_none_of_it": {"resized": (10, 12), "turn": ((1, 0, 60), (0, 1, 0)), "size": (5, 6)},
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_whole_pixels_are_exact(geometry, channels):
    assert error_of(arguments(noise(channels), index=1, **geometry)) < 1e-9


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("geometry", TURNS.values(), ids=TURNS)
def test_turns(geometry, channels):
    assert error_of(arguments(noise(channels), index=1, **geometry)) <= TURN_ERROR


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("geometry", RESIZES.values(), ids=RESIZES)
def test_resizes(geometry, channels):
    assert error_of(arguments(noise(channels), index=1, **geometry)) <= RESIZE_ERROR


def test_a_white_image_stays_white():
    """The rounded weights add up to one, whatever the scale."""
    images = torch.full((1, 97, 211, 3), 255, dtype=torch.uint8)
    for resized in ((3, 7), (31, 64), (96, 210), (98, 212), (300, 500)):
        assert torch.equal(
            ops.warp(**arguments(images, resized=resized)),
            torch.full((1,), 255.0).expand(1, 3, *resized),
        )


SIDES = st.integers(1, 40)
ANGLES = st.floats(-400, 400)


@st.composite
def calls(draw) -> dict:
    """Arguments of a batch of up to five images, with colour or without."""
    channels = draw(st.sampled_from([1, 3, 4]))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    count, batch = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    height, width = draw(SIDES), draw(SIDES)
    images = torch.randint(
        0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator
    )
    size = (draw(SIDES), draw(SIDES))
    boxes, resized, turns = [], [], []
    for _ in range(batch):
        left, top = draw(st.integers(-20, 40)), draw(st.integers(-20, 40))
        right, bottom = left + draw(SIDES), top + draw(SIDES)
        kind = draw(st.sampled_from(["crop", "resize", "cut"]))
        crop_size = (bottom - top, right - left)
        if kind != "crop":
            crop_size = (draw(SIDES), draw(SIDES))
        corner = (left, top)
        if kind == "cut":
            corner = (left + draw(st.floats(-0.9, 0.4)), top + draw(st.floats(-0.9, 0.4)))
            right, bottom = right + draw(st.floats(-0.5, 0.9)), bottom + draw(st.floats(-0.5, 0.9))
        boxes.append((*corner, right, bottom))
        resized.append(crop_size)
        angle = draw(st.one_of(st.sampled_from([0, 90, 180, 270]), ANGLES))
        zoom = draw(st.one_of(st.just(1.0), st.floats(0.1, 10)))
        (a, b, c), (d, e, f) = rotation(angle, size, crop_size, zoom)
        mirror = draw(st.sampled_from([-1, 1]))
        dx, dy = (draw(st.one_of(st.integers(-9, 9), st.floats(-9, 9))) for _ in range(2))
        turns.append(((mirror * a, b, c + dx), (mirror * d, e, f + dy)))
    planes = 1 if channels == 1 else 3
    return {
        "images": images,
        "index": torch.randint(0, count, (batch,), generator=generator),
        "boxes": torch.tensor(boxes, dtype=torch.float64),
        "resized": torch.tensor(resized),
        "turns": torch.tensor(turns, dtype=torch.float64),
        "size": size,
        "scale": torch.rand(planes, generator=generator) + 0.5,
        "shift": torch.randn(planes, generator=generator),
        "colours": (torch.eye(3, 4) + torch.randn((batch, 3, 4), generator=generator) / 4)
        if planes == 3 and draw(st.booleans())
        else None,
    }


@settings(max_examples=100)
@given(args=calls(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_random_calls(args, dtype):
    """Within the error of resize and turn, what colour and scale make of that, and the rounding of
    the output."""
    exact = reference_warp.warp(**args, dtype=torch.float64)
    value = ops.warp(**args, dtype=dtype)
    assert value.dtype == dtype
    assert value.is_contiguous(memory_format=torch.channels_last)
    spread = 1.0 if args["colours"] is None else args["colours"][..., :3].abs().sum(2).max().item()
    grey = spread * (RESIZE_ERROR + TURN_ERROR) * args["scale"].max()
    rounding = torch.finfo(dtype).eps * (exact.abs() + grey + spread * 255)
    assert ((value.double() - exact).abs() <= grey + rounding).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_scale_and_shift_normalise(channels):
    images = noise(channels)
    args = arguments(images, index=1)
    planes = len(args["scale"])
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:planes], torch.tensor([0.2, 0.25, 0.3])[:planes]
    args |= {"scale": 1 / (255 * std), "shift": -mean / std}
    expected = v2.normalize(as_chw(images, 1).double() / 255, mean.tolist(), std.tolist())
    torch.testing.assert_close(ops.warp(**args)[0].double(), expected, rtol=1e-6, atol=1e-6)
    half = ops.warp(**args, dtype=torch.bfloat16)[0]
    torch.testing.assert_close(half.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_mix_and_clamp(channels):
    """Brightness, contrast about grey and saturation as matrices, as torchvision has them."""
    images = noise(channels)
    image = as_chw(images, 1).double() / 255
    luminance = torch.tensor([0.2989, 0.587, 0.114]).expand(3, 3)
    matrices = {
        "brightness": (torch.eye(3) * 1.6, v2.adjust_brightness(image, 1.6)),
        "saturation": (
            torch.eye(3) * 1.9 - 0.9 * luminance,
            v2.adjust_saturation(image, 1.9),
        ),
    }
    args = arguments(images, index=1)
    for name, (matrix, expected) in matrices.items():
        colours = torch.cat([matrix, torch.zeros(3, 1)], dim=1)[None]
        value = ops.warp(**args, colours=colours)[0].double() / 255
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=name)
    inverted = torch.cat([-torch.eye(3), torch.ones(3, 1)], dim=1)[None]
    torch.testing.assert_close(
        ops.warp(**args, colours=inverted)[0].double(), 255 - 255 * image, rtol=0, atol=1e-4
    )


def test_the_fourth_byte_of_rgbx_is_ignored():
    for turn in (IDENTITY, rotation(33, (20, 30), (20, 30))):
        for resized in ((20, 30), (17, 41)):
            wide = noise(4)
            others = wide.clone()
            others[..., 3] = 255 - others[..., 3]
            args = arguments(wide, (0, 0, 30, 20), resized, turn)
            value = ops.warp(**args)
            assert torch.equal(value, ops.warp(**args | {"images": others}))
            assert torch.equal(value, ops.warp(**args | {"images": wide[..., :3].contiguous()}))


def test_rows_may_be_apart():
    """A crop of a larger tensor, or rows that a decoder padded, are read where they lie."""
    for channels in (1, 3, 4):
        padded = noise(channels, 25, 37)
        for view in (padded[:, 2:22, 3:33], padded[1:, :20, 7:], padded[:, ::2], padded[::2]):
            for turn in (IDENTITY, rotation(33, (20, 30), (20, 30))):
                for resized in (None, (17, 41)):
                    args = arguments(view, resized=resized, turn=turn)
                    expected = ops.warp(**args | {"images": view.contiguous()})
                    assert torch.equal(ops.warp(**args), expected)


def test_nothing_beyond_an_image_is_read():
    """The last image of a batch ends where the memory does; the allocator's neighbours differ."""
    for channels in (1, 3, 4):
        base = noise(channels, 20, 30, count=3)
        for turn in (IDENTITY, rotation(33, (20, 30), (20, 30)), ((1, 0, 0.5), (0, 1, 0.5))):
            for resized in ((20, 30), (17, 41)):
                args = arguments(base, (0, 0, 30, 20), resized, turn, index=1)
                expected = ops.warp(**args)
                changed = base.clone()
                changed[0], changed[2] = 0, 255
                assert torch.equal(ops.warp(**args | {"images": changed}), expected)


def test_nothing_beyond_an_output_is_written():
    """Each image of a batch is written alone, and not a value more."""
    for channels in (1, 3):
        for dtype in (torch.float32, torch.bfloat16):
            for turn in (IDENTITY, rotation(33, (20, 30), (20, 30))):
                args = arguments(noise(channels), turn=turn)
                batch = torch.full((3, channels, 20, 30), 7.0, dtype=dtype)
                batch = batch.contiguous(memory_format=torch.channels_last)
                assert ops.warp(**args, out=batch[1:2]).data_ptr() == batch[1:2].data_ptr()
                assert (batch[0] == 7).all()
                assert (batch[2] == 7).all()
                assert torch.equal(batch[1], ops.warp(**args, dtype=dtype)[0])


def batch_of(count: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(count, generator=generator) * 60 - 30
    left = torch.randint(-4, 5, (count, 2), generator=generator).double()
    return {
        "images": torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator),
        "index": torch.randint(0, 8, (count,), generator=generator),
        "boxes": torch.cat([left, left + 32], dim=1),
        "resized": torch.tensor([32, 32]).expand(count, 2).contiguous(),
        "turns": torch.tensor(
            [rotation(angle, (32, 32), (32, 32)) for angle in angles.tolist()], dtype=torch.float64
        ).reshape(count, 2, 3),
        "size": (32, 32),
        "scale": torch.ones(3),
        "shift": torch.zeros(3),
    }


PER_IMAGE = ("index", "boxes", "resized", "turns")


def test_a_batch_is_its_images_at_any_number_of_threads():
    args = batch_of(67)
    singly = [
        ops.warp(**args | {name: args[name][i : i + 1] for name in PER_IMAGE}) for i in range(67)
    ]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.warp(**args), torch.cat(singly))
    finally:
        torch.set_num_threads(threads)


def test_threads_of_python_fill_rows_of_one_batch():
    args = batch_of(67)
    batch = torch.empty(67, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def fill(i: int) -> None:
        one = {name: args[name][i : i + 1] for name in PER_IMAGE}
        ops.warp(**args | one, out=batch[i : i + 1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(67)))
    assert torch.equal(batch, ops.warp(**args))


def test_other_threads_of_python_run_meanwhile():
    args = batch_of(400) | {"resized": torch.full((400, 2), 256), "size": (256, 256)}
    done, ticks = threading.Event(), []

    def tick() -> None:
        while not done.wait(1e-3):
            ticks.append(time.perf_counter())

    ticking = threading.Thread(target=tick)
    ticking.start()
    begin = time.perf_counter()
    ops.warp(**args)
    end = time.perf_counter()
    done.set()
    ticking.join()
    # Some at the edges would be seen even if the call held the lock.
    third = (end - begin) / 3
    assert any(begin + third < tick < end - third for tick in ticks)


def test_an_empty_batch():
    assert ops.warp(**batch_of(0)).shape == (0, 3, 32, 32)


def test_autograd_notices_that_out_was_overwritten():
    args = batch_of(2)
    batch = ops.warp(**args)
    weight = torch.ones(3, 32, 32, requires_grad=True)
    loss = (weight * batch).sum()
    ops.warp(**args, out=batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Every level of the processor computes the same.

# Without the package, whose import takes longer than all the calls.
CALLS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
calls = torch.load(sys.argv[2])
for call in calls.values():
    torch.ops.fastresnet.warp.default(*call)
results = {name: call[-1] for name, call in calls.items()}
torch.save((torch.ops.fastresnet.isa(), results), sys.argv[3])
"""


def calls_for_levels() -> dict[str, tuple]:
    """Plain ones, whose results are grey levels, and normalised ones with colour."""
    calls = {}

    def add(name: str, args: dict, dtype: torch.dtype) -> None:
        planes = len(args["scale"])
        out = torch.zeros((1, planes, *args["size"]), dtype=dtype)
        out = out.contiguous(memory_format=torch.channels_last)
        tensors = [args[key] for key in ("images", *PER_IMAGE, "scale", "shift")]
        calls[name] = (*tensors, args.get("colours"), out)

    for case, geometry in (GEOMETRIES | TURNS | RESIZES).items():
        for channels in (1, 3, 4):
            args = arguments(noise(channels), **geometry)
            add(f"plain {case} {channels}", args, torch.float32)
            planes = len(args["scale"])
            args = args | {"scale": torch.rand(planes) / 64, "shift": torch.randn(planes)}
            if planes == 3:
                args["colours"] = torch.eye(3, 4)[None] + torch.randn(1, 3, 4) / 4
            for dtype in (torch.float32, torch.bfloat16):
                add(f"normalised {case} {channels} {dtype}", args, dtype)
    return calls


@pytest.fixture(scope="module")
def at_levels(tmp_path_factory) -> dict[str, tuple[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("warp")
    torch.save(calls_for_levels(), folder / "calls")
    library = importlib.util.find_spec("fastresnet._C").origin
    found = {}
    for level in LEVELS:
        paths = (library, str(folder / "calls"), str(folder / level))
        done = subprocess.run(
            [sys.executable, "-c", CALLS, *paths],
            capture_output=True,
            text=True,
            env={**os.environ, "FASTRESNET_ISA": level},
        )
        assert done.returncode == 0, done.stderr
        found[level] = torch.load(folder / level)
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_levels_agree(at_levels, level):
    """Grey levels are the same to the bit; colour, scale and shift may round once otherwise."""
    isa, results = at_levels[level]
    assert isa == level
    for name, expected in at_levels["default"][1].items():
        if name.startswith("plain"):
            assert torch.equal(results[name], expected), name
        else:
            rounding = torch.finfo(expected.dtype).eps
            # A sum of three products and an offset, each of up to some hundred levels, in float32.
            terms = 16 * 512 * torch.finfo(torch.float32).eps / 64
            torch.testing.assert_close(results[name], expected, rtol=rounding, atol=terms, msg=name)


# What it says to bad input.

BAD = {
    "float_images": ({"images": torch.rand(1, 20, 30, 3)}, "images of uint8, got Float"),
    "three_dimensions": (
        {"images": torch.zeros(20, 30, 3, dtype=torch.uint8)},
        r"images of 4 dimensions \(N, H, W, C\), got shape \[20, 30, 3\]",
    ),
    "two_channels": (
        {"images": torch.zeros(1, 20, 30, 2, dtype=torch.uint8)},
        "images of 1, 3 or 4 channels",
    ),
    "channels_first": (
        {"images": torch.zeros(1, 3, 20, 30, dtype=torch.uint8).permute(0, 2, 3, 1)},
        "images whose rows are dense",
    ),
    "no_pixels": (
        {"images": torch.zeros(1, 0, 30, 3, dtype=torch.uint8)},
        "images of 1 to 32767 pixels a side",
    ),
    "index_too_large": ({"index": torch.tensor([1])}, r"index in 0\.\.0, got 1"),
    "index_negative": ({"index": torch.tensor([-1])}, r"index in 0\.\.0, got -1"),
    "index_int32": (
        {"index": torch.tensor([0], dtype=torch.int32)},
        r"index of Long \[1\], contiguous, got Int \[1\]",
    ),
    "boxes_float32": ({"boxes": torch.tensor([[0.0, 0, 30, 20]])}, r"boxes of Double \[1, 4\]"),
    "box_reversed": (
        {"boxes": torch.tensor([[30.0, 0, 0, 20]], dtype=torch.float64)},
        r"left < right and top < bottom, within 65534 pixels, got \(30, 0, 0, 20\) for image 0",
    ),
    "box_empty": (
        {"boxes": torch.tensor([[3.0, 5, 9, 5]], dtype=torch.float64)},
        "top < bottom",
    ),
    "box_nan": (
        {"boxes": torch.tensor([[math.nan, 0, 30, 20]], dtype=torch.float64)},
        r"boxes .*got \(nan, 0, 30, 20\)",
    ),
    "box_far_away": (
        {"boxes": torch.tensor([[1e9, 0, 2e9, 20]], dtype=torch.float64)},
        "within 65534 pixels",
    ),
    "resized_to_nothing": (
        {"resized": torch.tensor([[0, 30]])},
        r"resized sizes of 1 to 32767, got \(0, 30\) for image 0",
    ),
    "turn_nan": (
        {"turns": torch.tensor([[[1, 0, 0], [0, math.nan, 0]]], dtype=torch.float64)},
        r"turns that lead no further .* got row \(0, nan, 0\)",
    ),
    "turn_infinite": (
        {"turns": torch.tensor([[[1, 0, math.inf], [0, 1, 0]]], dtype=torch.float64)},
        "turns that lead no further",
    ),
    "turns_of_3x3": (
        {"turns": torch.eye(3, dtype=torch.float64)[None]},
        r"turns of Double \[1, 2, 3\], contiguous, got Double \[1, 3, 3\]",
    ),
    "scale_of_one": ({"scale": torch.ones(1)}, r"scale of Float \[3\]"),
    "shift_float64": ({"shift": torch.zeros(3).double()}, r"shift of Float \[3\]"),
    "colours_3x3": ({"colours": torch.eye(3)[None]}, r"colours of Float \[1, 3, 4\]"),
    "colours_for_grey": (
        {
            "images": torch.zeros(1, 20, 30, 1, dtype=torch.uint8),
            "scale": torch.ones(1),
            "shift": torch.zeros(1),
            "colours": torch.eye(3, 4)[None],
        },
        "colours for images in colour only",
    ),
    "dtype": ({"dtype": torch.float16}, "out of float32 or bfloat16, got Half"),
    "out_of_another_size": (
        {"out": torch.zeros(1, 3, 20, 31)},
        r"out of size \(20, 30\), got \(20, 31\)",
    ),
    "out_of_another_batch": (
        {"out": torch.zeros(2, 3, 20, 30).contiguous(memory_format=torch.channels_last)},
        r"index of Long \[2\]",
    ),
    "out_contiguous": (
        {"out": torch.zeros(1, 3, 20, 30)},
        r"out of shape \[B, 3, h, w\], dense in channels_last",
    ),
    "out_requires_grad": (
        {
            "out": torch.zeros(1, 3, 20, 30)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_()
        },
        "out that needs no gradient",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(change, message):
    args = arguments(noise(3, count=1)) | change
    with pytest.raises(ValueError, match=f"^warp: expected .*{message}"):
        ops.warp(**args)


def test_the_twin_takes_over_where_kernels_are_off(monkeypatch):
    args = batch_of(3)
    expected = reference_warp.warp(**args)
    monkeypatch.setattr(_extension, "_active", {"cpu": False, "cuda": False})
    assert torch.equal(ops.warp(**args), expected)
    batch = torch.zeros(3, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert ops.warp(**args, out=batch) is batch
    assert torch.equal(batch, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    args = arguments(noise(3), resized=(11, 13), turn=rotation(20, (9, 8), (11, 13)), size=(9, 8))
    out = torch.zeros(1, 3, 9, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    tensors = [args[name] for name in ("images", *PER_IMAGE, "scale", "shift")]
    for colours in (None, torch.eye(3, 4)[None]):
        torch.library.opcheck(torch.ops.fastresnet.warp.default, (*tensors, colours, out))
