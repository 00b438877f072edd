# SPDX-License-Identifier: Apache-2.0
"""torchvision's residual blocks with fused batch norm, ReLU and add: only ``forward`` differs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from ..ops import Fork
from .batch_norm import PendingBatchNorm, add_relu, add_relu_fork, fused_call, has_hooks
from .fold_store import Foldable, forget_folds
from .folded_blocks import folded_blocks
from .links import Link
from .residual import residual_block
from .running_stats import update_running_stats
from .sequential import FusedSequential


def shortcut(downsample: nn.Module | None, x: Tensor) -> PendingBatchNorm | Tensor:
    """``downsample(x)`` (or ``x`` without one), a batch norm at its end left pending.

    Args:
        downsample: a module, usually ``nn.Sequential`` of a 1x1 convolution and a batch norm.
        x: [N, C, H, W].
    """
    if downsample is None:
        return x
    if type(downsample) not in (nn.Sequential, FusedSequential) or has_hooks(downsample):
        return downsample(x)
    for module in downsample:
        x = fused_call(module, x)
    return x


def fused_block(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor | None:
    """``block`` as one node in training, as one call in inference; None where it can be
    neither."""
    if not torch.is_grad_enabled():
        return folded_blocks([block], x)
    forget_folds(block)
    result = residual_block(block.links, block.relu, block.downsample, x)
    if result is None:
        return None
    update_running_stats(result.seen)
    return result.out


def links_of(block: nn.Module, *names: tuple[str, str]) -> list[Link]:
    """Not by ``nn.Module``'s attributes, which take ten times as long."""
    modules = block._modules
    return [Link(modules[conv], modules[bn]) for conv, bn in names]


class BasicBlock(Foldable, resnet.BasicBlock):
    """Two 3x3 convolutions and a shortcut (He et al., 2015)."""

    @property
    def links(self) -> list[Link]:
        """The convolutions with their batch norms, in order."""
        return links_of(self, ("conv1", "bn1"), ("conv2", "bn2"))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, planes, H / stride, W / stride]."""
        fused = fused_block(self, x)
        if fused is not None:
            return fused

        out, residual = self.branches(x, x)
        return add_relu(self.relu, out, residual, overwrite=True)

    def fork(self, x: Fork) -> Fork:
        """:meth:`forward` between blocks whose gradients are added as they are read."""
        return add_relu_fork(self.relu, *self.branches(*x))

    def branches(
        self, x: Tensor, identity: Tensor
    ) -> tuple[PendingBatchNorm | Tensor, PendingBatchNorm | Tensor]:
        """What the block adds: the way through the convolutions, and the shortcut."""
        out = self.conv1(x)
        out = fused_call(self.bn1, out)
        out = fused_call(self.relu, out)

        out = self.conv2(out)
        out = fused_call(self.bn2, out)

        return out, shortcut(self.downsample, identity)


class Bottleneck(Foldable, resnet.Bottleneck):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al., 2015; stride in the 3x3)."""

    @property
    def links(self) -> list[Link]:
        """The convolutions with their batch norms, in order."""
        return links_of(self, ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, 4 * planes, H / stride, W / stride]."""
        fused = fused_block(self, x)
        if fused is not None:
            return fused

        out, residual = self.branches(x, x)
        return add_relu(self.relu, out, residual, overwrite=True)

    def fork(self, x: Fork) -> Fork:
        """:meth:`forward` between blocks whose gradients are added as they are read."""
        return add_relu_fork(self.relu, *self.branches(*x))

    def branches(
        self, x: Tensor, identity: Tensor
    ) -> tuple[PendingBatchNorm | Tensor, PendingBatchNorm | Tensor]:
        """What the block adds: the way through the convolutions, and the shortcut."""
        out = self.conv1(x)
        out = fused_call(self.bn1, out)
        out = fused_call(self.relu, out)

        out = self.conv2(out)
        out = fused_call(self.bn2, out)
        out = fused_call(self.relu, out)

        out = self.conv3(out)
        out = fused_call(self.bn3, out)

        return out, shortcut(self.downsample, identity)
