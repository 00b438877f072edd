# SPDX-License-Identifier: Apache-2.0
"""torch's optimisers on views in memory order: the same numbers, states and hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastresnet import optim

KINDS = [
    pytest.param("SGD", {}, id="sgd"),
    pytest.param("SGD", {"momentum": 0.9}, id="sgd-momentum"),
    pytest.param(
        "SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, id="sgd-nesterov"
    ),
    pytest.param("SGD", {"momentum": 0.9, "dampening": 0.2, "maximize": True}, id="sgd-dampening"),
    pytest.param("Adam", {"amsgrad": True}, id="adam"),
    pytest.param("AdamW", {"weight_decay": 0.1}, id="adamw"),
    pytest.param("Adagrad", {"weight_decay": 0.1}, id="adagrad"),
]


def network(memory_format: torch.memory_format = torch.channels_last) -> nn.Sequential:
    """Weights of 4 dimensions that are out of order and some that are not, and vectors."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, (3, 1), groups=2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 6 * 8, 5)).to(
        memory_format=memory_format
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 10, 10, generator=generator)).square().sum().backward()
        optimizer.step()


def pair(kind: str, settings: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Two equal networks, and for one our optimiser, for the other torch's."""
    ours, theirs = network(), network()
    return (
        *(ours, getattr(optim, kind)(ours.parameters(), lr=1e-3, **settings)),
        *(theirs, getattr(torch.optim, kind)(theirs.parameters(), lr=1e-3, fused=True, **settings)),
    )


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_numbers_and_states_are_torchs(kind: str, settings: dict[str, Any]) -> None:
    ours, our_optimizer, theirs, their_optimizer = pair(kind, settings)
    train(ours, our_optimizer, 3)
    train(theirs, their_optimizer, 3)
    assert_same(ours, theirs)
    assert set(our_optimizer.state) <= set(ours.parameters())
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        state = our_optimizer.state[mine]
        assert state.keys() == their_optimizer.state[yours].keys()
        for name, value in their_optimizer.state[yours].items():
            assert torch.equal(state[name], value)
            assert state[name].shape == value.shape
            assert state[name].stride() == value.stride()


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_states_are_exchanged_with_torchs(kind: str, settings: dict[str, Any]) -> None:
    ours, our_optimizer, theirs, their_optimizer = pair(kind, settings)
    train(ours, our_optimizer, 2)
    train(theirs, their_optimizer, 2)
    saved = our_optimizer.state_dict()
    our_optimizer.load_state_dict(their_optimizer.state_dict())
    their_optimizer.load_state_dict(saved)
    train(ours, our_optimizer, 2, seed=2)
    train(theirs, their_optimizer, 2, seed=2)
    assert_same(ours, theirs)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_no_weight_is_copied(kind: str, settings: dict[str, Any]) -> None:
    """The reason for all of this: otherwise torch copies to tensors in order and back."""
    ours, our_optimizer, theirs, their_optimizer = pair(kind, settings)
    train(ours, our_optimizer, 1)
    train(theirs, their_optimizer, 1)

    def copies(optimizer: torch.optim.Optimizer) -> int:
        with torch.profiler.profile(record_shapes=True) as profiler:
            optimizer.step()
        copied = [event for event in profiler.events() if event.name == "aten::copy_"]
        return sum(len(event.input_shapes[0]) == 4 for event in copied)

    assert copies(our_optimizer) == 0
    assert copies(their_optimizer) > 0


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_state_in_another_layout(kind: str, settings: dict[str, Any]) -> None:
    """As from a checkpoint of a network that was not in channels_last."""
    ours, our_optimizer, theirs, their_optimizer = pair(kind, settings)
    other = network(torch.contiguous_format)
    optimizer = getattr(torch.optim, kind)(other.parameters(), lr=1e-3, fused=True, **settings)
    train(other, optimizer, 2)
    for model, mine in ((ours, our_optimizer), (theirs, their_optimizer)):
        mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, mine, 2)
    assert_same(ours, theirs)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_hooks_and_closure_are_called_once(kind: str, settings: dict[str, Any]) -> None:
    ours, optimizer, *_ = pair(kind, settings)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> torch.Tensor:
        called.append("closure")
        assert torch.is_grad_enabled()
        assert ours[0].weight.shape == (8, 3, 3, 3)
        optimizer.zero_grad()
        loss = ours(torch.ones(2, 3, 10, 10)).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss > 0
    assert called == ["before", "closure", "after"]


def test_a_parameter_without_a_gradient_stays() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in optimizer.state


@pytest.mark.parametrize("overflow", [False, True])
def test_gradient_scaler(overflow: bool) -> None:
    results = []
    for kind in (optim.SGD, torch.optim.SGD):
        model = network()
        extra = {} if kind is optim.SGD else {"fused": True}
        optimizer = kind(model.parameters(), lr=1e-3, momentum=0.9, **extra)
        train(model, optimizer, 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3, 10, 10)).square().sum()
        scaler.scale(loss * float("inf") if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append((model, scaler.get_scale()))
    (ours, our_scale), (theirs, their_scale) = results
    assert_same(ours, theirs)
    assert our_scale == their_scale == (4.0 if overflow else 8.0)


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad])
def test_what_is_not_fused_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        make(network().parameters(), lr=0.1, foreach=True)
