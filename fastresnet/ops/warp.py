# SPDX-License-Identifier: Apache-2.0
"""Crop, resize, turn, colour and normalise: from bytes to a network's input in one operator.

Where the compiled operator is not active, or the images are not on the CPU, the twin in
:mod:`fastresnet.ops.reference_warp` runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from ..memory import empty_images
from . import reference_warp


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
    """Augments and normalises one batch, each image in its own way.

    A position is a distance in pixels from the upper left corner; the centre of the first pixel is
    at (0.5, 0.5). What lies outside an image or a crop is black. For image ``b`` of the batch:

    1. ``images[index[b]]`` is cropped to ``boxes[b]``, which may reach outside the image and may
       cut through pixels.
    2. The crop is resized to ``resized[b]``: bilinear and antialiased, as
       ``torchvision.transforms.v2.functional.resize(..., antialias=True)``.
    3. The value of the output at ``(x, y)`` is that of the resized crop at
       ``turns[b] @ (x, y, 1)``, bilinear between pixels and, beyond the outer ones, between them
       and black: ``grid_sample(padding_mode="zeros", align_corners=False)``, which torchvision's
       ``rotate`` and ``affine`` call.
    4. With ``colours``, RGB in 0..1 becomes ``colours[b] @ (R, G, B, 1)``, clamped to 0..1.
    5. The result, as grey levels in 0..255, is ``value * scale + shift``.

    Args:
        images: uint8 [N, H, W, C] with dense rows: grey (C = 1), RGB (3) or RGB and a fourth byte
            that is ignored (4), which is the fastest in colour. Sides of up to 32767.
        index: int64 [B], in 0..N-1.
        boxes: float64 [B, 4], (left, top, right, bottom) in positions in the image.
        resized: int64 [B, 2], (height, width) of the resized crop.
        turns: float64 [B, 2, 3], from positions in the output to positions in the resized crop.
        size: (h, w) of the output.
        scale, shift: float32 [1] for grey images, [3] for others. For ``(v / 255 - mean) / std``
            they are ``1 / (255 * std)`` and ``-mean / std``.
        colours: float32 [B, 3, 4], or None for none; not for grey images.
        dtype: of the output, float32 or bfloat16. Not used with ``out``.
        out: where to write instead, [B, 1 or 3, h, w], channels_last.

    Returns:
        [B, 1 or 3, h, w], channels_last; ``out`` where that is given.

        The resized crop is rounded to whole grey levels, once for each direction, as torchvision
        does with uint8; a crop that keeps its size is not touched. Interpolation in the turn is
        within 1/32 of a grey level of exact, and pixels that a turn leaves whole (flips, right
        angles, shifts by whole pixels) are exact. All that is done in whole numbers, alike on every
        ISA level; colour, scale and shift are float32.

    Raises:
        ValueError: a tensor has another shape, dtype or layout, a box is empty, an index is out of
            range, or a turn leads too far away. ``out`` is then as it was.
    """
    channels = 1 if images.shape[-1] == 1 else 3
    if out is None:
        out = (
            empty_images(len(index), channels, size, dtype=dtype)
            if images.device.type == "cpu"
            else torch.empty(
                (len(index), channels, *size),
                dtype=dtype,
                device=images.device,
                memory_format=torch.channels_last,
            )
        )
    elif out.shape[2:] != tuple(size):
        raise ValueError(f"warp: expected out of size {tuple(size)}, got {tuple(out.shape[2:])}")
    elif out.requires_grad:
        raise ValueError("warp: expected out that needs no gradient, got one that requires it")
    else:
        torch.autograd.graph.increment_version(out)  # the operator alone would go unnoticed
    if not _extension.is_active("cpu") or images.device.type != "cpu":
        return reference_warp.warp(
            *(images, index, boxes, resized, turns),
            size=size,
            scale=scale,
            shift=shift,
            colours=colours,
            out=out,
        )
    torch.ops.fastresnet.warp.default(
        images, index, boxes, resized, turns, scale, shift, colours, out
    )
    return out


if _extension.has_schemas:

    @torch.library.register_fake("fastresnet::warp")
    def _(images, index, boxes, resized, turns, scale, shift, colours, out):
        return None
