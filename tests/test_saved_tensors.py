# SPDX-License-Identifier: Apache-2.0
"""Hooks on saved tensors, such as torch's `save_on_cpu`, may hand them back in another layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import fastresnet
from fastresnet import models, ops


def resnet_of_joins() -> nn.Module:
    """Blocks that are no nodes: a hook looks at a convolution of each."""
    model = models.resnet18(num_classes=5)
    for module in model.modules():
        if isinstance(module, fastresnet.nn.BasicBlock):
            module.conv2.register_forward_hook(lambda *_: None)
    return model


NETWORKS = {
    "resnet18": lambda: models.resnet18(num_classes=5),
    "resnet50": lambda: models.resnet50(num_classes=5),
    "joins": resnet_of_joins,
    "vgg11_bn": lambda: models.vgg11_bn(num_classes=5, dropout=0.0),
}


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = model(x).square().sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_network(make: Callable[[], nn.Module]) -> None:
    model = make().to(memory_format=torch.channels_last).train()
    x = torch.randn(2, 3, 64, 64)
    expected = gradients(model, x)
    with save_on_cpu(pin_memory=True):
        found = gradients(model, x)
    for ours, wanted in zip(found, expected, strict=True):
        # Not bit by bit: torch's own convolutions and products choose by layout, too.
        assert (ours - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", ["bn", "bn_relu", "bn_add_relu", "bn_add_bn_relu", "max_pool"])
def test_operator(name: str) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        x, residual = (
            torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
            for _ in range(2)
        )
        weight, bias = torch.rand(8, requires_grad=True), torch.rand(8, requires_grad=True)
        own = (x, *ops.bn_stats(x), weight, bias)
        other = (residual, *ops.bn_stats(residual), None, None)
        match name:
            case "bn_add_relu":
                out = ops.bn_add_relu(*own, residual, training=True)
            case "bn_add_bn_relu":
                out = ops.bn_add_bn_relu(*own, *other, training=True)
            case "max_pool":
                windows = {"kernel_size": 3, "stride": 2, "padding": 1}
                out = ops.bn_relu_max_pool(*own, **windows, eps=1e-5, training=True)
            case _:
                out = getattr(ops, name)(*own, training=True)
        return list(torch.autograd.grad(out.square().sum(), [x, weight, bias]))

    expected = run()
    with save_on_cpu(pin_memory=True):
        found = run()
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)
