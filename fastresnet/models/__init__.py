# SPDX-License-Identifier: Apache-2.0
"""torchvision's networks and some smaller ones on the fused operators, and ``convert`` for any
other."""

from .convert import convert, revert
from .lab3 import lab3_head
from .pretrained import WeightsError, load_pretrained
from .projection import resnet50_projection
from .registry import MODELS, build_model
from .resnet import (
    ResNet,
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
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .simple_cnn import simple_cnn
from .small import cifar_resnet18, resnet18_truncated
from .summary import LayerSummary, ModelSummary, summarize
from .vgg import (
    VGG,
    VGG11_BN_Weights,
    VGG13_BN_Weights,
    VGG16_BN_Weights,
    VGG19_BN_Weights,
    vgg11_bn,
    vgg13_bn,
    vgg16_bn,
    vgg19_bn,
)

__all__ = [
    "MODELS",
    "VGG",
    "LayerSummary",
    "ModelSummary",
    "ResNeXt50_32X4D_Weights",
    "ResNeXt101_32X8D_Weights",
    "ResNeXt101_64X4D_Weights",
    "ResNet",
    "ResNet18_Weights",
    "ResNet34_Weights",
    "ResNet50_Weights",
    "ResNet101_Weights",
    "ResNet152_Weights",
    "VGG11_BN_Weights",
    "VGG13_BN_Weights",
    "VGG16_BN_Weights",
    "VGG19_BN_Weights",
    "WeightsError",
    "Wide_ResNet50_2_Weights",
    "Wide_ResNet101_2_Weights",
    "build_model",
    "cifar_resnet18",
    "convert",
    "lab3_head",
    "load_pretrained",
    "resnet18",
    "resnet18_truncated",
    "resnet34",
    "resnet50",
    "resnet50_projection",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "revert",
    "simple_cnn",
    "summarize",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
