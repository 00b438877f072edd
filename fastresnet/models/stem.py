# SPDX-License-Identifier: Apache-2.0
"""First convolutions for images of other than three channels, and how a convolution starts."""

from __future__ import annotations

from torch import nn

from .convert import ModuleT


def he_init(conv: nn.Conv2d) -> nn.Conv2d:
    """Initialises ``conv`` as torchvision does in its ResNets and VGGs (He et al., 2015), in place.

    Returns:
        ``conv``.
    """
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def set_in_channels(model: ModuleT, in_channels: int) -> ModuleT:
    """Gives ``model`` a new first convolution, for images of ``in_channels`` channels, in place.

    A model that takes such images already is left as it is.

    Args:
        model: its first convolution is an ``nn.Conv2d`` without groups.
        in_channels: 1 for grey images.

    Returns:
        ``model``.
    """
    name, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if conv.in_channels != in_channels:
        new = nn.Conv2d(
            *(in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding),
            bias=conv.bias is not None,
        )
        model.set_submodule(name, he_init(new))
    return model
