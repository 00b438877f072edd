# SPDX-License-Identifier: Apache-2.0
"""``warp`` on batches of photographs and of small images, beside torchvision's transforms and
batched operations of plain torch that do the same to the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import Comparison
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from fastresnet import ops
from fastresnet.ops import reference_warp

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MARGIN = 4  # pixels that a small image's crop may reach outside


@dataclass(frozen=True)
class Case:
    """The central square of each image, at a shift of up to `MARGIN` pixels where it is not
    resized, to `size`, flipped every second time, rotated by up to 30 degrees or not."""

    name: str
    height: int
    width: int
    size: int
    batch: int
    rotated: bool
    dtype: str = "float32"


CASES = (
    Case("photographs-876x584-to-512-rotated", 584, 876, 512, 8, True),
    Case("photographs-876x584-to-512", 584, 876, 512, 8, False),
    Case("small-32-rotated", 32, 32, 32, 256, True),
    Case("small-32", 32, 32, 32, 256, False),
)


@dataclass(frozen=True)
class Batch:
    """Images [N, H, W, 3] and, for each, the crop's corner, whether it is flipped, degrees."""

    images: Tensor
    side: int
    size: int
    top: list[int]
    left: list[int]
    flip: list[bool]
    degrees: list[float]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_warp(case: Case, run: Callable[[Comparison], None]) -> None:
    batch = drawn(case)
    comparison = Comparison(
        "warp",
        case.name,
        metric="throughput",
        unit="images/s",
        work=case.batch,
        config=asdict(case),
    )
    call = arguments(batch)
    peers = [("torchvision", torchvision_way)]
    if batch.side == batch.size:
        peers.append(("torch, batched", batched_way))
    for name, way in peers:
        role = "baseline" if name == "torchvision" else "peer"
        comparison.add(
            name, lambda way=way: way(batch), lambda way=way: {"out": way(batch)}, role=role
        )
    comparison.add(
        "fastresnet", lambda: ops.warp(**call), lambda: {"out": ops.warp(**call)}, role="ours"
    )
    comparison.check({"out": reference_warp.warp(**call, dtype=torch.float64)})
    run(comparison)


def drawn(case: Case) -> Batch:
    """Smooth images, as photographs are, and random choices."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand((case.batch, 3, 9, 9), generator=generator)
    fine = F.interpolate(coarse, (case.height, case.width), mode="bicubic")
    images = (fine * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    side = min(case.height, case.width)
    reach = MARGIN if side == case.size else 0
    shifts = torch.randint(-reach, reach + 1, (2, case.batch), generator=generator)
    degrees = (torch.rand(case.batch, generator=generator) * 60 - 30) * case.rotated
    return Batch(
        images,
        side,
        case.size,
        top=((case.height - side) // 2 + shifts[0]).tolist(),
        left=((case.width - side) // 2 + shifts[1]).tolist(),
        flip=[i % 2 == 1 for i in range(case.batch)],
        degrees=degrees.tolist(),
    )


def turn(degrees: float, size: int, flip: bool) -> list[list[float]]:
    """From the output to the crop: back by the angle, then back by the flip, about the centre."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    sign = -1 if flip else 1
    centre = size / 2
    return [
        [sign * c, -sign * s, centre - sign * (c - s) * centre],
        [s, c, centre - (s + c) * centre],
    ]


def arguments(batch: Batch) -> dict:
    count = len(batch.images)
    corners = torch.tensor([batch.left, batch.top], dtype=torch.float64).T
    turns = [turn(d, batch.size, f) for d, f in zip(batch.degrees, batch.flip, strict=True)]
    return {
        "images": batch.images,
        "index": torch.arange(count),
        "boxes": torch.cat([corners, corners + batch.side], dim=1),
        "resized": torch.full((count, 2), batch.size),
        "turns": torch.tensor(turns, dtype=torch.float64),
        "size": (batch.size, batch.size),
        "scale": 1 / (255 * torch.tensor(STD)),
        "shift": -torch.tensor(MEAN) / torch.tensor(STD),
    }


def torchvision_way(batch: Batch) -> Tensor:
    """An image at a time, in bytes for as long as torchvision stays in bytes."""
    results = []
    for i, image in enumerate(batch.images.permute(0, 3, 1, 2)):
        image = functional.crop(image, batch.top[i], batch.left[i], batch.side, batch.side)
        image = functional.resize(image, [batch.size, batch.size], antialias=True)
        if batch.flip[i]:
            image = functional.horizontal_flip(image)
        if batch.degrees[i] != 0:
            image = functional.rotate(image, batch.degrees[i], InterpolationMode.BILINEAR)
        image = functional.to_dtype(image, torch.float32, scale=True)
        results.append(functional.normalize(image, MEAN, STD))
    return torch.stack(results)


def batched_way(batch: Batch) -> Tensor:
    """Small images that are not resized, all at once."""
    padded = F.pad(batch.images, (0, 0, MARGIN, MARGIN, MARGIN, MARGIN))
    windows = padded.unfold(1, batch.size, 1).unfold(2, batch.size, 1).permute(0, 1, 2, 4, 5, 3)
    numbers = torch.arange(len(batch.images))
    top, left = (torch.tensor(corner) + MARGIN for corner in (batch.top, batch.left))
    crops = windows[numbers, top, left]
    crops = torch.where(torch.tensor(batch.flip).view(-1, 1, 1, 1), crops.flip(2), crops)
    pixels = crops.permute(0, 3, 1, 2).float()
    if any(batch.degrees):
        angle = torch.tensor(batch.degrees).deg2rad()
        c, s = angle.cos(), angle.sin()
        zero = torch.zeros_like(c)
        turns = torch.stack([c, -s, zero, s, c, zero], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(turns, list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, align_corners=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return torch.addcmul(-mean / std, pixels, 1 / (255 * std))
