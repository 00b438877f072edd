# SPDX-License-Identifier: Apache-2.0
"""A head that keeps where in the image something was seen, as a lab report on diabetic retinopathy
describes it."""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import nn

__all__ = ["lab3_head"]

_STRIDE = 32  # pixels of the image a value of layer4's map
_WINDOW = 7


def lab3_head(
    model: torchvision.models.ResNet, image_size: int, num_classes: int
) -> torchvision.models.ResNet:
    """Replaces ``avgpool`` by averages over every 7 x 7 values of ``layer4``'s map (stride 1), and
    ``fc`` by a linear layer on all of them, in place.

    Images of 512 x 512 have a map of 16 x 16, so that the linear layer of a ResNet-18 takes 10 x 10
    x 512 = 51,200 values. A map of at most 7 x 7 (images up to 224 x 224) is averaged whole, as in
    the standard model. The model then takes images of ``image_size`` only.

    Args:
        model: a ResNet of total stride 32, as torchvision's are.
        image_size: height and width of the images.
        num_classes: width of the output.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a ResNet that ends in a global average and a linear layer, or
            its total stride is another.
        ValueError: ``image_size`` is not positive.
    """
    if not (
        isinstance(model, torchvision.models.ResNet)
        and isinstance(model.avgpool, nn.AdaptiveAvgPool2d)
        and isinstance(model.fc, nn.Linear)
    ):
        raise TypeError(
            "model: expected a ResNet whose avgpool is AdaptiveAvgPool2d and whose fc is Linear, "
            f"got {type(model).__name__} with {', '.join(dict(model.named_children()))}"
        )
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    side = -(-image_size // _STRIDE)  # each of five halvings rounds up
    found = _map_size(model, image_size)
    if found != side**2:
        raise TypeError(
            f"model: expected a ResNet of total stride {_STRIDE}, whose layer4 makes {side**2} "
            f"places of an image of {image_size} x {image_size}, got one that makes {found}"
        )
    window = min(_WINDOW, side)
    positions = (side - window + 1) ** 2
    model.avgpool = nn.AvgPool2d(window, stride=1)
    model.fc = nn.Linear(model.fc.in_features * positions, num_classes)
    return model


def _map_size(model: torchvision.models.ResNet, image_size: int) -> int:
    """The places in ``layer4``'s map, found without computing anything."""
    trunk = copy.deepcopy(model).to("meta").eval()
    trunk.avgpool, trunk.fc = nn.Identity(), nn.Identity()
    image = torch.empty(1, model.conv1.in_channels, image_size, image_size, device="meta")
    with torch.no_grad():
        return trunk(image.to(model.conv1.weight.dtype)).numel() // model.fc.in_features
