# SPDX-License-Identifier: Apache-2.0
"""torchvision's residual networks on the fused operators: same builders, arguments, weights,
``state_dict`` and, for the same seed, the same initial values."""

from __future__ import annotations

import functools

import torch
import torchvision
from torch import Tensor
from torchvision.models import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNet152_Weights,
    ResNeXt50_32X4D_Weights,
    ResNeXt101_32X8D_Weights,
    ResNeXt101_64X4D_Weights,
    Wide_ResNet50_2_Weights,
    Wide_ResNet101_2_Weights,
)

from ..nn.average_pool import average_pool
from ..nn.batch_norm import to_kernel_layout
from ..nn.classifier import classify
from ..nn.fold_store import Foldable
from ..nn.stages import run_stages
from ..nn.stem import run_stem
from .convert import fused_builder, fuses, scriptable_twin

__all__ = [
    "ResNeXt50_32X4D_Weights",
    "ResNeXt101_32X8D_Weights",
    "ResNeXt101_64X4D_Weights",
    "ResNet",
    "ResNet18_Weights",
    "ResNet34_Weights",
    "ResNet50_Weights",
    "ResNet101_Weights",
    "ResNet152_Weights",
    "Wide_ResNet50_2_Weights",
    "Wide_ResNet101_2_Weights",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


@fuses(torchvision.models.ResNet)
class ResNet(Foldable, torchvision.models.ResNet):
    """``torchvision.models.ResNet`` that runs in channels_last, its stem fused.

    The blocks are fused where ``block`` is :class:`fastresnet.nn.BasicBlock` or
    :class:`fastresnet.nn.Bottleneck`.
    """

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = to_kernel_layout(x)
        x, source = run_stem(self.conv1, self.bn1, self.relu, self.maxpool, x)
        x = run_stages([self.layer1, self.layer2, self.layer3, self.layer4], x, source)

        x = average_pool(self.avgpool, x)
        x = torch.flatten(x, 1)
        return classify(self.fc, x)

    def __prepare_scriptable__(self) -> torchvision.models.ResNet:
        return scriptable_twin(self)


_fused = functools.partial(fused_builder, module=__name__)

resnet18 = _fused(torchvision.models.resnet18)
resnet34 = _fused(torchvision.models.resnet34)
resnet50 = _fused(torchvision.models.resnet50)
resnet101 = _fused(torchvision.models.resnet101)
resnet152 = _fused(torchvision.models.resnet152)
resnext50_32x4d = _fused(torchvision.models.resnext50_32x4d)
resnext101_32x8d = _fused(torchvision.models.resnext101_32x8d)
resnext101_64x4d = _fused(torchvision.models.resnext101_64x4d)
wide_resnet50_2 = _fused(torchvision.models.wide_resnet50_2)
wide_resnet101_2 = _fused(torchvision.models.wide_resnet101_2)
