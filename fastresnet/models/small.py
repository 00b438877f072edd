# SPDX-License-Identifier: Apache-2.0
"""ResNet-18 for small images."""

from __future__ import annotations

from torch import nn

from ..nn import BasicBlock
from .convert import convert
from .resnet import ResNet
from .stem import he_init, set_in_channels

__all__ = ["cifar_resnet18", "resnet18_truncated"]


def cifar_resnet18(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18 for images of 32 x 32: a 3x3 stem of stride 1 and no max-pooling.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images (1 for grey ones).
    """
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    model.conv1 = he_init(nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False))
    model.maxpool = nn.Identity()
    return model


def resnet18_truncated(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18 without ``layer3`` and ``layer4``, for images of about 64 x 64.

    The head is ``Linear(128, 64)``, ``BatchNorm1d(64)``, GELU, ``Linear(64, num_classes)``, under
    the keys ``fc.0``, ``fc.1`` and ``fc.3``; all other keys are torchvision's.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images (1 for grey ones).
    """
    model = ResNet(BasicBlock, [2, 2, 2, 2])
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Sequential(
        nn.Linear(128, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, num_classes)
    )
    return convert(set_in_channels(model, in_channels))
