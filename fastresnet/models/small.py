# SPDX-License-Identifier: Apache-2.0
"""Residual networks for small images: the stem keeps the resolution."""

from __future__ import annotations

from torch import nn

from ..nn import BasicBlock
from .resnet import ResNet

__all__ = ["cifar_resnet18"]


def cifar_resnet18(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18 for images of 32 x 32: a 3x3 stem of stride 1 and no max-pooling.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images (1 for grey ones).
    """
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
