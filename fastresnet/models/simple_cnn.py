# SPDX-License-Identifier: Apache-2.0
"""A network of two convolutions, the least that is worth training on CIFAR-10."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .convert import convert

__all__ = ["simple_cnn"]


def simple_cnn(
    num_classes: int = 10, in_channels: int = 3, *, image_size: int = 32, dropout: float = 0.5
) -> nn.Sequential:
    """Two 3x3 convolutions of 32 and 64 channels, each with batch norm, ReLU and a max-pool that
    halves the map; then dropout and one linear layer.

    With the defaults it has 60,554 parameters. The keys are ``features.0`` and ``features.4`` for
    the convolutions (with bias), ``features.1`` and ``features.5`` for their batch norms, and
    ``fc``.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images (1 for grey ones).
        image_size: height and width of the images; the linear layer takes no others.
        dropout: probability in 0..1 with which a value in front of ``fc`` is dropped.

    Raises:
        ValueError: the images are too small to be halved twice.
    """
    if image_size < 4:
        raise ValueError(f"image_size: expected at least 4, got {image_size}")
    side = image_size // 2 // 2
    layers = OrderedDict(
        features=nn.Sequential(*_stage(in_channels, 32), *_stage(32, 64)),
        dropout=nn.Dropout(dropout),
        flatten=nn.Flatten(),
        fc=nn.Linear(64 * side * side, num_classes),
    )
    return convert(nn.Sequential(layers))


def _stage(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
