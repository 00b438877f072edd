# SPDX-License-Identifier: Apache-2.0
"""What the loop expects of a loader, and batches on their way to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torchvision.transforms import v2

from fastresnet.train.config import MixConfig


class Loader(Protocol):
    """Batches of images, float32 or bfloat16 [B, C, H, W], and labels, int64 [B].

    ``state_dict`` says where the latest iteration stands; after ``load_state_dict`` the next one
    goes on from there.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def set_epoch(self, epoch: int, *, image_size: int | None = None) -> None: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def to_device(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Moves a batch to the device, the images in channels_last."""
    return (
        images.to(device, non_blocking=True, memory_format=torch.channels_last),
        labels.to(device, non_blocking=True),
    )


def build_mix(
    config: MixConfig, *, classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """What blends a batch: images and labels, int64 [B], become images and shares of classes,
    float32 [B, classes]. None where nothing is to be blended. It draws from torch's generator."""
    ways = []
    if config.mixup:
        ways.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        ways.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    if not ways or config.probability == 0:
        return None
    mix = v2.RandomChoice(ways) if len(ways) > 1 else ways[0]

    def blend(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if torch.rand(()) >= config.probability:
            return images, labels
        images, shares = mix(images, labels)
        return images.contiguous(memory_format=torch.channels_last), shares

    return blend
