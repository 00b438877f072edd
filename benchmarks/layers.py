# SPDX-License-Identifier: Apache-2.0
"""The convolutions of a network's residual blocks, found by running it on the meta device.

The stem is none of them: its input has three channels, which our convolutions are not meant for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torchvision
from providers import build
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

POSITIONS = ("first", "middle", "last", "shortcut")


@dataclass(frozen=True)
class Layer:
    """A convolution on square images, and its place in a block.

    position: where in its block it is, which says what surrounds it. "middle" and "last" have a
    batch norm and a ReLU in front; the gradient of "last" and "shortcut" comes from the block's
    end; that of the input of "first" has the shortcut's added.
    projected: whether the block's shortcut is a convolution.
    """

    channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    side: int
    position: str
    projected: bool

    @property
    def name(self) -> str:
        stride = f"s{self.stride}" if self.stride > 1 else ""
        return (
            f"{self.channels}x{self.side}x{self.side}-{self.out_channels}-"
            f"{self.kernel}x{self.kernel}{stride}-{self.position}"
        )

    @property
    def prologue(self) -> bool:
        """Whether its input is relu(batch norm) of the convolution in front."""
        return self.position in ("middle", "last")

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def out_side(self) -> int:
        reach = self.dilation * (self.kernel - 1) + 1
        return (self.side + 2 * self.padding - reach) // self.stride + 1

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def conv_layers(architecture: str, side: int) -> dict[Layer, int]:
    """The distinct convolutions of the architecture's blocks, in order, and how often each is
    there."""
    with torch.device("meta"):
        model = build(torchvision.models, architecture)
    found: Counter[Layer] = Counter()
    handles = [
        conv.register_forward_hook(_recorder(found, position, block.downsample is not None))
        for block in model.modules()
        if isinstance(block, (BasicBlock, Bottleneck))
        for conv, position in _positions(block)
    ]
    model(torch.empty(2, 3, side, side, device="meta"))
    for handle in handles:
        handle.remove()
    return dict(found)


def _positions(block: BasicBlock | Bottleneck) -> list[tuple[nn.Conv2d, str]]:
    chain = [m for m in block.children() if isinstance(m, nn.Conv2d)]
    positions = ["first", *["middle"] * (len(chain) - 2), "last"]
    if block.downsample is not None:
        chain.append(block.downsample[0])
        positions.append("shortcut")
    return list(zip(chain, positions, strict=True))


def _recorder(found: Counter[Layer], position: str, projected: bool):
    def record(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        layer = Layer(
            channels=conv.in_channels,
            out_channels=conv.out_channels,
            kernel=conv.kernel_size[0],
            stride=conv.stride[0],
            padding=conv.padding[0],
            dilation=conv.dilation[0],
            side=inputs[0].shape[-1],
            position=position,
            # What the others' gradients pass through does not depend on it.
            projected=projected and position == "first",
        )
        assert layer.out_side == output.shape[-1]
        found[layer] += 1

    return record
