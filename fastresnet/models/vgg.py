# SPDX-License-Identifier: Apache-2.0
"""torchvision's VGG networks with batch norm on the fused operators: same builders, arguments,
weights, ``state_dict`` and, for the same seed, the same initial values."""

from __future__ import annotations

import functools

import torch
import torchvision
from torch import Tensor
from torchvision.models import (
    VGG11_BN_Weights,
    VGG13_BN_Weights,
    VGG16_BN_Weights,
    VGG19_BN_Weights,
)

from ..nn.batch_norm import to_kernel_layout
from ..nn.classifier import classify
from ..nn.fold_store import Foldable
from .convert import fused_builder, fuses, scriptable_twin

__all__ = [
    "VGG",
    "VGG11_BN_Weights",
    "VGG13_BN_Weights",
    "VGG16_BN_Weights",
    "VGG19_BN_Weights",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
]


@fuses(torchvision.models.VGG)
class VGG(Foldable, torchvision.models.VGG):
    """``torchvision.models.VGG`` that runs in channels_last.

    Batch norm and ReLU are fused where ``features`` is a :class:`fastresnet.nn.FusedSequential`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_classes]."""
        x = self.features(to_kernel_layout(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return classify(self.classifier, x)

    def __prepare_scriptable__(self) -> torchvision.models.VGG:
        return scriptable_twin(self)


_fused = functools.partial(fused_builder, module=__name__)

vgg11_bn = _fused(torchvision.models.vgg11_bn)
vgg13_bn = _fused(torchvision.models.vgg13_bn)
vgg16_bn = _fused(torchvision.models.vgg16_bn)
vgg19_bn = _fused(torchvision.models.vgg19_bn)
