# SPDX-License-Identifier: Apache-2.0
"""Recipes, overrides of their settings, and the schedules they describe."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from fastresnet.train import RECIPES, ConfigError, apply_overrides, override
from fastresnet.train.config import ScheduleConfig, to_dict
from fastresnet.train.optim import schedule_factor
from fastresnet.train.overrides import from_dict

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
            "augment.mean=(0.5, 0.25, 0.125)",
            "augment.std=0.5,0.5,0.5",
            "augment.zoom=0.9,1.1",
            "augment.size=48,64",
            "data.validation=none",
            "loss.class_weights=1,2,0.5",
            "schedule.patience=3",
            "amp=none",
            "seed=7",
        ],
    )
    assert changed.optim == dataclasses.replace(RECIPE.optim, lr=0.02, nesterov=False)
    assert changed.schedule.epochs == 5
    assert changed.schedule.kind == "cosine"
    assert changed.schedule.sizes == (8, 16, 32)
    assert changed.augment.mean == (0.5, 0.25, 0.125)
    assert changed.augment.zoom == (0.9, 1.1)
    assert (changed.augment.height, changed.augment.width) == (48, 64)
    assert changed.data.validation is None
    assert changed.loss.class_weights == (1.0, 2.0, 0.5)
    assert changed.schedule.patience == 3
    assert (changed.amp, changed.seed) == ("none", 7)
    assert changed.model == RECIPE.model
    assert override(changed, "schedule.sizes=").schedule.sizes == ()
    assert override(changed, "augment.size=40").augment.size == 40
    assert override(changed, "loss.class_weights=balanced").loss.class_weights == "balanced"
    assert override(changed, "schedule.patience=none").schedule.patience is None


def test_overrides_are_checked_together_whatever_their_order() -> None:
    assignments = ["augment.size=24", "schedule.sizes=12,24"]
    for order in (assignments, assignments[::-1]):
        assert apply_overrides(RECIPE, order).schedule.sizes == (12, 24)
    with pytest.raises(ConfigError, match=r"schedule.sizes: .*at most augment.size=24, got 32"):
        override(RECIPE, "augment.size=24")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lr", "expected NAME=VALUE, got 'optim.lr'"),
        ("optim.rate=1", "no setting 'optim.rate'; there are: optim.kind, optim.lr, optim.mom"),
        ("lr=1", "no setting 'lr'; there are: .*optim.lr, "),
        ("optim=1", "no setting 'optim'; there are: "),
        ("optim.lr.value=1", "no setting 'optim.lr'"),
        ("optim.lr=fast", "optim.lr: expected a finite number, got 'fast'"),
        ("optim.lr=nan", "optim.lr: expected a finite number, got 'nan'"),
        ("optim.lr=0", "optim.lr: expected more than 0, got 0.0"),
        ("optim.momentum=0", "optim.nesterov: expected false where optim.momentum is 0"),
        ("schedule.epochs=2.5", "schedule.epochs: expected a whole number, got '2.5'"),
        ("schedule.kind=linear", "expected one of one-cycle, cosine, .*constant, got 'linear'"),
        ("schedule.kind=step", 'schedule.milestones: expected epochs where .* "step", got '),
        ("schedule.milestones=3,2", "schedule.milestones: expected ascending epochs"),
        ("schedule.patience=0", "schedule.patience: expected at least 1, or none, got 0"),
        ("augment.hflip=2", "augment: expected a probability hflip in 0..1, got 2.0"),
        ("augment.zoom=1", "augment.zoom: expected 2 values, got '1'"),
        ("augment.size=x", "augment.size: expected a whole number, got 'x'"),
        ("augment.crop=left", "augment.crop: expected one of center, random, "),
        ("loss.kind=regression", r"loss.label_smoothing: expected 0 in a regression, got 0.05"),
        ("loss.class_weights=even", "expected one of none, balanced, got 'even'"),
        ("loss.class_weights=1,-1", "a weight of at least 0 for each class"),
        ("evaluation.select=kappa", "evaluation.ordinal: expected true where evaluation.select"),
        ("optim.kind=lion", "expected one of sgd, adam, adamw, adagrad, got 'lion'"),
        ("optim.betas=0.9,1", "optim.betas: expected two values in 0..1"),
        ("optim.clip_norm=0", "optim.clip_norm: expected more than 0, or none, got 0.0"),
        ("optim.accumulate=0", "optim.accumulate: expected at least 1, got 0"),
        ("mix.mixup=-1", "mix.mixup: expected at least 0, got -1.0"),
        ("checkpoint.every_steps=0", "checkpoint.every_steps: expected more than 0, or none"),
        ("ema=1", "ema: expected a factor in 0..1, or none, got 1.0"),
        ("data.dataset.name=x", "no setting 'data.dataset'"),
        ("schedule.sizes=16,x", "schedule.sizes: expected a whole number, got 'x'"),
        ("optim.nesterov=1", "optim.nesterov: expected true or false, got '1'"),
        ("amp=fp8", "amp: expected one of auto, bf16, fp16, none, got 'fp8'"),
        ("data.validation=1", r"data.validation: expected a share in 0\.\.1, or none, got 1.0"),
    ],
)
def test_bad_overrides_say_what_was_expected(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(RECIPE, assignment)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_named_frozen_and_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    plain = json.loads(json.dumps(to_dict(recipe)))
    assert plain["optim"]["lr"] == recipe.optim.lr
    assert from_dict(plain) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.optim.lr = 1.0


def test_a_configuration_read_back_is_checked() -> None:
    plain = to_dict(RECIPE)
    with pytest.raises(ConfigError, match=r"optim: expected the settings kind, lr, .*, got rate"):
        from_dict({**plain, "optim": {"rate": 1.0}})
    with pytest.raises(ConfigError, match="augment: expected a probability hflip"):
        from_dict({**plain, "augment": {**plain["augment"], "hflip": 7}})


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
        # Epochs of two steps; down behind the first, in the warm-up unseen, and the third.
        ("step", [0.2, 0.6, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]),
        ("exponential", [0.2, 0.6, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]),
        # Two triangles of four steps.
        ("cyclical", [0.2, 0.6, 1.0, 0.6, 0.2, 0.6, 1.0, 0.6]),
    ],
)
def test_schedule_values(kind: str, expected: list[float]) -> None:
    config = ScheduleConfig(
        epochs=4,
        kind=kind,
        warmup=0.25,
        start=0.2,
        final=0.1,
        gamma=0.5,
        milestones=(1, 3),
        cycles=2,
    )
    steps = range(len(expected))
    factors = [schedule_factor(step, config=config, steps_per_epoch=2) for step in steps]
    assert factors == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["step", "exponential"])
def test_schedules_are_torchs(kind: str) -> None:
    config = ScheduleConfig(epochs=6, kind=kind, warmup=0.0, gamma=0.7, milestones=(2, 3))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    lr_scheduler = torch.optim.lr_scheduler
    peer = (
        lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.7)
        if kind == "step"
        else lr_scheduler.ExponentialLR(optimizer, 0.7)
    )
    for epoch in range(6):
        for step in range(3 * epoch, 3 * epoch + 3):
            factor = schedule_factor(step, config=config, steps_per_epoch=3)
            assert factor == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_schedule_of_a_few_steps_stays_in_range(total_steps: int) -> None:
    for kind in ("one-cycle", "cosine", "constant", "exponential", "cyclical"):
        config = ScheduleConfig(epochs=1, kind=kind)
        for step in range(total_steps + 1):
            assert 0 <= schedule_factor(step, config=config, steps_per_epoch=total_steps) <= 1


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
        assert resolve_amp("fp16", cpu) is torch.float16
        assert resolve_amp("none", cpu) is None
