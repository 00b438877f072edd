# SPDX-License-Identifier: Apache-2.0
"""The reference backend: the whole image decoded, then torchvision's v2 functions one by one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fastresnet.data.augment import Augment, choose, colour_matrices
from fastresnet.data.backend import PooledBackend
from fastresnet.data.decode import decode, read_header, upright


class TorchvisionBackend(PooledBackend):
    """What an :class:`Augment` means, in torchvision's words; the other backends are held to it."""

    name = "torchvision"

    def load(self, data: bytes, numbers: np.ndarray, augment: Augment, out: Tensor) -> None:
        header = read_header(data)
        pixels = upright(decode(data, header), header.orientation)
        image = torch.from_numpy(pixels[:, :, :3].copy()).permute(2, 0, 1)
        choices = choose(augment, np.array([pixels.shape[:2]]), numbers[None])
        left, top, right, bottom = (int(side) for side in choices.boxes[0])
        image = F.resized_crop(
            image,
            *(top, left, bottom - top, right - left),
            size=list(out.shape[2:]),
            interpolation=InterpolationMode.BILINEAR,
            antialias=True,
        )
        if choices.hflips[0]:
            image = F.horizontal_flip(image)
        if choices.vflips[0]:
            image = F.vertical_flip(image)
        image = torch.rot90(image, int(choices.quarters[0]), (1, 2))
        angle, zoom = float(choices.angles[0]), float(choices.zooms[0])
        if angle or zoom != 1:
            image = F.affine(
                image,
                angle=-angle,  # clockwise there
                translate=[0, 0],
                scale=zoom,
                shear=[0.0, 0.0],
                interpolation=InterpolationMode.BILINEAR,
            )
        values = F.to_dtype(image, torch.float32, scale=True)
        if augment.changes_colour:
            colour = torch.from_numpy(colour_matrices(choices)[0])
            values = torch.einsum("rc,chw->rhw", colour[:, :3], values) + colour[:, 3, None, None]
            values = values.clamp_(0, 1)
        scale, shift = (torch.from_numpy(row)[:, None, None] for row in augment.normalisation(3))
        out.copy_(values * (scale * 255) + shift)
