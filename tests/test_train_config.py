# SPDX-License-Identifier: Apache-2.0
"""Recipes, overrides of their settings, and the schedules they describe."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from fastresnet.train import RECIPES, ConfigError, apply_overrides, override
from fastresnet.train.config import OptimConfig, ScheduleConfig, to_dict
from fastresnet.train.optim import build_optimizer, build_schedule, schedule_factor

RECIPE = RECIPES["fashion-mnist"]()


def test_overrides_parse_by_type_and_leave_the_rest() -> None:
    changed = apply_overrides(
        RECIPE,
        [
            "optim.lr=0.02",
            "optim.nesterov=False",
            "schedule.epochs=5",
            "schedule.kind = cosine",
            "schedule.sizes=8,16,32",
            "data.mean=(0.5, 0.25, 0.125)",
            "amp=none",
            "seed=7",
        ],
    )
    assert changed.optim == dataclasses.replace(RECIPE.optim, lr=0.02, nesterov=False)
    assert changed.schedule.epochs == 5
    assert changed.schedule.kind == "cosine"
    assert changed.schedule.sizes == (8, 16, 32)
    assert changed.data.mean == (0.5, 0.25, 0.125)
    assert (changed.amp, changed.seed) == ("none", 7)
    assert changed.model == RECIPE.model
    assert override(changed, "schedule.sizes=").schedule.sizes == ()


def test_overrides_are_checked_together_whatever_their_order() -> None:
    assignments = ["data.image_size=24", "schedule.sizes=12,24"]
    for order in (assignments, assignments[::-1]):
        assert apply_overrides(RECIPE, order).schedule.sizes == (12, 24)
    with pytest.raises(ConfigError, match=r"schedule.sizes: .*divide data.image_size=24, got 16"):
        override(RECIPE, "data.image_size=24")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lr", "expected NAME=VALUE, got 'optim.lr'"),
        ("optim.rate=1", "no setting 'optim.rate'; there are: optim.lr, optim.momentum, "),
        ("lr=1", "no setting 'lr'; there are: .*optim.lr, "),
        ("optim=1", "no setting 'optim'; there are: "),
        ("optim.lr.value=1", "no setting 'optim.lr'"),
        ("optim.lr=fast", "optim.lr: expected a finite number, got 'fast'"),
        ("optim.lr=nan", "optim.lr: expected a finite number, got 'nan'"),
        ("optim.lr=0", "optim.lr: expected more than 0, got 0.0"),
        ("optim.momentum=0", "optim.nesterov: expected false where optim.momentum is 0"),
        ("schedule.epochs=2.5", "schedule.epochs: expected a whole number, got '2.5'"),
        ("schedule.kind=linear", "expected one of one-cycle, cosine, constant, got 'linear'"),
        ("schedule.sizes=16,x", "schedule.sizes: expected a whole number, got 'x'"),
        ("optim.nesterov=1", "optim.nesterov: expected true or false, got '1'"),
        ("amp=fp8", "amp: expected one of auto, bf16, none, got 'fp8'"),
        ("data.validation=1", r"data.validation: expected a share in 0\.\.1, got 1.0"),
    ],
)
def test_bad_overrides_say_what_was_expected(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(RECIPE, assignment)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_named_frozen_and_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert json.loads(json.dumps(to_dict(recipe)))["optim"]["lr"] == recipe.optim.lr
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.optim.lr = 1.0


@pytest.mark.parametrize(
    ("epochs", "sizes", "expected"),
    [
        (3, (), [None, None, None]),
        (2, (16, 32), [16, 32]),
        (5, (16, 32), [16, 16, 16, 32, 32]),
        (3, (8, 16, 32), [8, 16, 32]),
        (1, (16, 32), [32]),
        (2, (8, 16, 32), [16, 32]),
    ],
)
def test_sizes_are_spread_over_the_epochs_and_end_at_the_last(
    epochs: int, sizes: tuple[int, ...], expected: list[int | None]
) -> None:
    schedule = ScheduleConfig(epochs=epochs, sizes=sizes)
    assert [schedule.image_size(epoch) for epoch in range(epochs)] == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # A quarter of eight steps from 0.2 up to 1, then six steps down towards 0.1.
        ("one-cycle", [0.2, 0.6, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1]),
        ("cosine", [0.2, 0.6, 1.0, 0.939711, 0.775, 0.55, 0.325, 0.160289, 0.1]),
        ("constant", [0.2, 0.6, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedule_values(kind: str, expected: list[float]) -> None:
    config = ScheduleConfig(epochs=1, kind=kind, warmup=0.25, start=0.2, final=0.1)
    factors = [schedule_factor(step, config=config, total_steps=8) for step in range(9)]
    assert factors == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_schedule_of_a_few_steps_stays_in_range(total_steps: int) -> None:
    for kind in ("one-cycle", "cosine", "constant"):
        config = ScheduleConfig(epochs=1, kind=kind)
        for step in range(total_steps + 1):
            assert 0 <= schedule_factor(step, config=config, total_steps=total_steps) <= 1


def test_optimizer_follows_the_schedule_and_spares_norms_and_biases() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert decayed["params"] == [model[0].weight]
    assert spared["params"] == [model[0].bias, model[1].weight, model[1].bias]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert decayed["nesterov"]

    config = ScheduleConfig(epochs=1, warmup=0.5, start=0.0)
    schedule = build_schedule(optimizer, config, total_steps=4)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [[0.0] * 2, [0.25] * 2, [0.5] * 2, [0.25] * 2]


def test_loss_of_precision_is_chosen_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastresnet.train.precision import resolve_amp

    cpu = torch.device("cpu")
    for capabilities, expected in (
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True}, None),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert resolve_amp("auto", cpu) is expected
        assert resolve_amp("bf16", cpu) is torch.bfloat16
        assert resolve_amp("none", cpu) is None
