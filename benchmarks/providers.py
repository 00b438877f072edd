# SPDX-License-Identifier: Apache-2.0
"""The models that are compared: torchvision's in their best configurations, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastresnet import models, optim

CLASSES = 1000
CIFAR_CLASSES = 10
STATISTICS_BATCHES, STATISTICS_BATCH = 2, 8

FACTORIES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
    *("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
)


@dataclass(frozen=True)
class ModelProvider:
    """Where a model comes from and how it runs.

    source: torchvision.models or fastresnet.models, which have the same factories.
    stock: float32 and NCHW whatever the case asks for, as most people run it.
    compile_mode: of torch.compile; None for its default.
    """

    name: str
    role: str
    source: ModuleType
    compiled: bool = False
    stock: bool = False
    compile_mode: str | None = None

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.contiguous_format if self.stock else torch.channels_last

    def model(
        self,
        architecture: str,
        weights: dict[str, torch.Tensor],
        device: torch.device | str = "cpu",
    ) -> nn.Module:
        """The architecture in training mode with a copy of `weights`."""
        model = build(self.source, architecture).to(memory_format=self.memory_format)
        model.load_state_dict(weights)
        model = without_dropout(model.train()).to(device)
        return torch.compile(model, mode=self.compile_mode) if self.compiled else model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum, by what takes the least time on the CPU: torch's fused kernel copies
        weights in channels_last, which costs more than its `foreach`'s several passes."""
        settings = {"lr": 1e-3, "momentum": 0.9}
        if self.role == "ours":
            return optim.SGD(model.parameters(), **settings)
        in_order = self.memory_format == torch.contiguous_format
        return torch.optim.SGD(model.parameters(), **settings, fused=in_order, foreach=not in_order)


MODEL_PROVIDERS = (
    ModelProvider("torchvision", "baseline", torchvision.models),
    ModelProvider("torch.compile", "peer", torchvision.models, compiled=True),
    ModelProvider("fastresnet", "ours", models),
    ModelProvider("fastresnet, torch.compile", "ours", models, compiled=True),
    ModelProvider("stock torchvision", "context", torchvision.models, stock=True),
)


def build(source: ModuleType, architecture: str) -> nn.Module:
    """`cifar_resnet18` is resnet18 with the 3x3 stem for small images, the rest a factory."""
    if architecture != "cifar_resnet18":
        return getattr(source, architecture)(num_classes=CLASSES)
    model = source.resnet18(num_classes=CIFAR_CLASSES)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with its dropout off (VGG's classifier has some): results are to be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def head_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last layer's bias, one value a class."""
    return list(weights.values())[-1]


def initial_weights(architecture: str) -> dict[str, torch.Tensor]:
    """Torchvision's initialisation, the same each time, but with quiet residual branches.

    As initialised, a ResNet-50's gradient in bfloat16 is further from float64 than its own length,
    so that no comparison would tell a right gradient from a wrong one. A small weight in each
    branch's last batch norm, as in a network that has begun to train, brings it near.
    """
    torch.manual_seed(0)
    model = build(torchvision.models, architecture)
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            nn.init.constant_(last.weight, 0.1)
    return model.state_dict()


@torch.no_grad()
def weights_in_use(architecture: str, side: int) -> dict[str, torch.Tensor]:
    """The initial weights, and batch norms with the statistics of their inputs; the same each time.

    Zeros and ones, which they begin with, make a batch norm the identity in evaluation mode: one
    that was folded wrongly, or left out, would pass the check.

    side: of the random images that the statistics are of.
    """
    model = build(torchvision.models, architecture)
    model.load_state_dict(initial_weights(architecture))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches, without the zeros and ones
    generator = torch.Generator().manual_seed(3)
    for _ in range(STATISTICS_BATCHES):
        model(torch.randn(STATISTICS_BATCH, 3, side, side, generator=generator))
    return model.state_dict()
