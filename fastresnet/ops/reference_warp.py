# SPDX-License-Identifier: Apache-2.0
"""``warp`` in plain torch: specification, fallback and baseline in one.

One image after another: the crop and the resize are two products with matrices of weights, the turn
is :func:`torch.nn.functional.grid_sample`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(
    images: Tensor,
    index: Tensor,
    boxes: Tensor,
    resized: Tensor,
    turns: Tensor,
    *,
    size: tuple[int, int],
    scale: Tensor,
    shift: Tensor,
    colours: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """As :func:`fastresnet.ops.warp`, with nothing rounded between the steps; computed in ``dtype``
    or in float32, whichever is more precise."""
    channels = 1 if images.shape[3] == 1 else 3
    if out is None:
        out = torch.empty(
            (len(index), channels, *size),
            dtype=dtype,
            device=images.device,
            memory_format=torch.channels_last,
        )
    precise = torch.promote_types(out.dtype, torch.float32)
    for i, image in enumerate(index.tolist()):
        pixels = images[image, ..., :channels].to(precise)
        value = _turned(_resized(pixels, boxes[i], resized[i]), turns[i], size)
        if colours is not None:
            matrix, offset = colours[i].to(value).split((3, 1), dim=1)
            value = (value @ matrix.T + 255 * offset[:, 0]).clamp(0, 255)
        out[i] = (value * scale.to(value) + shift.to(value)).permute(2, 0, 1)
    return out


def _resized(pixels: Tensor, box: Tensor, resized: Tensor) -> Tensor:
    """The crop of ``pixels`` [H, W, C], resized: [height, width, C]."""
    left, top, right, bottom = box.tolist()
    height, width = resized.tolist()
    rows = _weights(top, bottom, height, pixels.shape[0])
    columns = _weights(left, right, width, pixels.shape[1])
    return torch.einsum("ih,hwc,jw->ijc", rows.to(pixels), pixels, columns.to(pixels))


def _weights(begin: float, end: float, count: int, side: int) -> Tensor:
    """What each of ``side`` lines counts in each of ``count`` lines of a crop from ``begin`` to
    ``end``: float64 [count, side].

    Antialiased bilinear interpolation as in PIL and torch. The crop's lines outside the image are
    black: they have weights, which are not returned.
    """
    step = (end - begin) / count
    reach = max(step, 1.0)
    lines = torch.arange(int(begin // 1), int(-(-end // 1)))
    centres = begin + step * (torch.arange(count, dtype=torch.float64) + 0.5)
    weights = (1 - (lines + 0.5 - centres[:, None]).abs() / reach).clamp(min=0)
    weights /= weights.sum(1, keepdim=True)
    inside = (lines >= 0) & (lines < side)
    matrix = torch.zeros(count, side, dtype=torch.float64)
    matrix[:, lines[inside]] = weights[:, inside]
    return matrix


def _turned(crop: Tensor, turn: Tensor, size: tuple[int, int]) -> Tensor:
    """[h, w, C]: ``crop`` at the positions that ``turn`` gives the output's pixels."""
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in size)
    centres = torch.stack(torch.broadcast_tensors(x, y[:, None], torch.tensor(1.0)), dim=-1)
    positions = centres.double() @ turn.cpu().double().T
    height, width = crop.shape[:2]
    grid = 2 * positions / torch.tensor([width, height]) - 1  # grid_sample's crop is -1 to 1
    sampled = F.grid_sample(
        crop.permute(2, 0, 1)[None], grid[None].to(crop), mode="bilinear", align_corners=False
    )
    return sampled[0].permute(1, 2, 0)
