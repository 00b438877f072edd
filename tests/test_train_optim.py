# SPDX-License-Identifier: Apache-2.0
"""The optimisers that a recipe names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastresnet.train.config import OptimConfig
from fastresnet.train.optim import build_optimizer, set_learning_rate


def test_optimizer_spares_norms_and_biases_by_choice() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert decayed["params"] == [model[0].weight]
    assert spared["params"] == [model[0].bias, model[1].weight, model[1].bias]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert decayed["nesterov"]
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    every = build_optimizer(model, OptimConfig(weight_decay=0.1, decay_all=True)).param_groups
    assert [group["weight_decay"] for group in every] == [0.1, 0.1]


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "adagrad"])
def test_optimizers_are_torchs(kind: str) -> None:
    torch.manual_seed(0)
    ours, peer = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    peer.load_state_dict(ours.state_dict())
    config = OptimConfig(
        kind=kind, lr=0.1, momentum=0.8, nesterov=False, betas=(0.8, 0.9), weight_decay=0.01
    )
    class_ = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "adagrad": torch.optim.Adagrad,
    }[kind]
    settings = {"sgd": {"momentum": 0.8}, "adagrad": {}}.get(kind, {"betas": (0.8, 0.9)})
    groups = [
        {"params": [peer.weight], "weight_decay": 0.01},
        {"params": [peer.bias], "weight_decay": 0.0},
    ]
    optimizers = build_optimizer(ours, config), class_(groups, lr=0.1, foreach=False, **settings)
    for _ in range(3):
        x = torch.randn(4, 5, dtype=torch.float64)
        for model, optimizer in zip((ours, peer), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for name, tensor in peer.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)


def test_a_skipped_first_step_leaves_no_trace() -> None:
    """As float16's scaler skips it when a gradient has overflowed."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, nesterov=False, weight_decay=0))
    before = model.weight.detach().clone()
    # What is not initialised is NaN then, rather than by chance zero.
    torch.use_deterministic_algorithms(True)
    try:
        for gradient in (math.inf, 1.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(gradient > 1))
            optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(model.weight.detach(), before - 0.1)
