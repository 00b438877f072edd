# SPDX-License-Identifier: Apache-2.0
"""Every network of this package by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models import WeightsEnum

from . import resnet, vgg
from .pretrained import load_pretrained
from .projection import resnet50_projection
from .simple_cnn import simple_cnn
from .small import cifar_resnet18, resnet18_truncated
from .stem import set_in_channels

__all__ = ["MODELS", "build_model"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        resnet.resnet18,
        resnet.resnet34,
        resnet.resnet50,
        resnet.resnet101,
        resnet.resnet152,
        resnet.resnext50_32x4d,
        resnet.resnext101_32x8d,
        resnet.resnext101_64x4d,
        resnet.wide_resnet50_2,
        resnet.wide_resnet101_2,
        resnet50_projection,
        resnet18_truncated,
        cifar_resnet18,
        vgg.vgg11_bn,
        vgg.vgg13_bn,
        vgg.vgg16_bn,
        vgg.vgg19_bn,
        simple_cnn,
    )
}


def build_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    weights: WeightsEnum | str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """Builds the network called ``name``.

    Args:
        name: a key of ``MODELS``: the name of one of this package's factories.
        num_classes: width of the output; None for the factory's own default.
        in_channels: channels of the images (1 for grey ones).
        weights: what :func:`load_pretrained` takes, which leaves out the last layer where the
            number of classes is another; None for the initial values.
        options: further arguments of the factory.

    Raises:
        ValueError: there is no such name, a number is not positive, or the weights are wrong.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    for argument, number in (("num_classes", num_classes), ("in_channels", in_channels)):
        if number is not None and number < 1:
            raise ValueError(f"{argument}: expected at least 1, got {number}")
    factory = MODELS[name]
    if num_classes is not None:
        options["num_classes"] = num_classes
    if "in_channels" in inspect.signature(factory).parameters:
        model = factory(in_channels=in_channels, **options)
    else:  # torchvision's know nothing of it
        model = set_in_channels(factory(**options), in_channels)
    if weights is not None:
        load_pretrained(model, weights)
    return model
