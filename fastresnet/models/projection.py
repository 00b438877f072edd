# SPDX-License-Identifier: Apache-2.0
"""A ResNet-50 in which every block has a projection shortcut."""

from __future__ import annotations

from torch import nn

from ..nn import Bottleneck
from .convert import convert
from .resnet import ResNet
from .stem import he_init

__all__ = ["resnet50_projection"]


def resnet50_projection(
    num_classes: int = 100, in_channels: int = 3, *, dropout: float = 0.5
) -> ResNet:
    """ResNet-50 as it is found in reports and tutorials: every block has a projection shortcut (He
    et al., 2015, option C), convolutions have a bias, and a stage's stride is in the first 1x1.

    The last map is averaged to 2 x 2; dropout and a linear layer on 8,192 values follow. The keys
    are torchvision's, with a ``bias`` beside each convolution's ``weight``, a ``downsample`` in
    every block, and ``fc.1`` for the linear layer.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images (1 for grey ones).
        dropout: probability in 0..1 with which a value in front of the linear layer is dropped.
    """
    model = ResNet(Bottleneck, [3, 4, 6, 3])
    model.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3)
    for block in (m for m in model.modules() if isinstance(m, Bottleneck)):
        channels, width = block.conv1.in_channels, block.conv1.out_channels
        out_channels = block.conv3.out_channels
        block.conv1 = nn.Conv2d(channels, width, kernel_size=1, stride=block.stride)
        block.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        block.conv3 = nn.Conv2d(width, out_channels, kernel_size=1)
        block.downsample = nn.Sequential(
            nn.Conv2d(channels, out_channels, kernel_size=1, stride=block.stride),
            nn.BatchNorm2d(out_channels),
        )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            he_init(module)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.fc = nn.Sequential(nn.Dropout(dropout), nn.Linear(4 * 2048, num_classes))
    return convert(model)
