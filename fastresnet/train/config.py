# SPDX-License-Identifier: Apache-2.0
"""The typed configuration of a run, and overrides of one setting by its dotted name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting does not exist, or its value has the wrong type or range."""


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what is done to them before the network sees them."""

    dataset: str
    mean: tuple[float, ...]  # of pixels in 0..1, one value or one per channel
    std: tuple[float, ...]
    batch_size: int = 128
    validation: float = 1 / 12  # share of the training images held out to choose the best epoch
    image_size: int = 32
    padding: int = 4  # pixels of zeros on each side before the random crop
    flip: float = 0.5  # probability of a horizontal flip

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, "data.batch_size", "at least 1", self.batch_size)
        _require(0 < self.validation < 1, "data.validation", "a share in 0..1", self.validation)
        _require(self.image_size > 0, "data.image_size", "at least 1", self.image_size)
        _require(self.padding >= 0, "data.padding", "at least 0", self.padding)
        _require(0 <= self.flip <= 1, "data.flip", "a probability in 0..1", self.flip)


@dataclass(frozen=True)
class ModelConfig:
    """Which network: the name of a factory in ``fastresnet.models``."""

    name: str


@dataclass(frozen=True)
class OptimConfig:
    """Stochastic gradient descent with momentum."""

    lr: float = 0.1  # the highest learning rate of the schedule
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4  # never on biases and normalisation

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", "more than 0", self.lr)
        _require(0 <= self.momentum < 1, "optim.momentum", "a value in 0..1", self.momentum)
        _require(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)
        _require(
            not (self.nesterov and self.momentum == 0),
            "optim.nesterov",
            "false where optim.momentum is 0",
            self.nesterov,
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, at which image sizes, and how the learning rate moves by the step."""

    epochs: int
    kind: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    warmup: float = 0.25  # share of the steps in which the learning rate rises
    start: float = 0.04  # first learning rate, as a share of optim.lr
    final: float = 0.0  # learning rate approached at the end, as a share of optim.lr
    sizes: tuple[int, ...] = ()  # image sizes, spread evenly over the epochs; empty: the full size

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "schedule.epochs", "at least 1", self.epochs)
        _require(0 <= self.warmup < 1, "schedule.warmup", "a share in 0..1", self.warmup)
        _require(0 <= self.start <= 1, "schedule.start", "a share in 0..1", self.start)
        _require(0 <= self.final <= 1, "schedule.final", "a share in 0..1", self.final)
        _require(all(size > 0 for size in self.sizes), "schedule.sizes", "sizes > 0", self.sizes)

    def image_size(self, epoch: int) -> int | None:
        """The image size of an epoch (counted from 0), or None for the full size."""
        sizes = self.sizes[-self.epochs :]  # the last ones, where there are fewer epochs than sizes
        return sizes[epoch * len(sizes) // self.epochs] if sizes else None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result."""

    name: str
    data: DataConfig
    model: ModelConfig
    schedule: ScheduleConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    label_smoothing: float = 0.0
    amp: Literal["auto", "bf16", "none"] = "auto"  # auto: bf16 where the device computes in it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    timed_steps: int = 5  # steps of each network in the comparison at the end; 0: no comparison

    def __post_init__(self) -> None:
        _require(
            0 <= self.label_smoothing < 1,
            "label_smoothing",
            "a share in 0..1",
            self.label_smoothing,
        )
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        _require(self.timed_steps >= 0, "timed_steps", "at least 0", self.timed_steps)
        for size in self.schedule.sizes:
            _require(
                self.data.image_size % size == 0,
                "schedule.sizes",
                f"sizes that divide data.image_size={self.data.image_size}",
                size,
            )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved configuration as plain values, for JSON."""
    return dataclasses.asdict(recipe)


def override(recipe: Recipe, assignment: str) -> Recipe:
    """Returns the recipe with one setting changed, as in ``override(recipe, "optim.lr=0.01")``."""
    return apply_overrides(recipe, [assignment])


def apply_overrides(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Returns the recipe with settings changed, all at once, as in ``["optim.lr=0.01", "seed=1"]``.

    Raises:
        ConfigError: no such setting, or a value that its type does not take; the message lists
            the settings there are, or the type that was expected.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"expected NAME=VALUE, got {assignment!r}")
        *groups, setting = name.strip().split(".")
        inner = changes
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{group} is a value, and cannot have {name!r} changed too")
        inner[setting] = text.strip()
    return _replace(recipe, changes, prefix="")


def _replace(config: Any, changes: dict[str, Any], *, prefix: str) -> Any:
    hints = get_type_hints(type(config))
    changed = {}
    for setting, change in changes.items():
        name = prefix + setting
        is_group = setting in hints and dataclasses.is_dataclass(hints[setting])
        if setting not in hints or is_group != isinstance(change, dict):
            settings = ", ".join(prefix + known for known in _settings(config))
            raise ConfigError(f"no setting {name!r}; there are: {settings}")
        changed[setting] = (
            _replace(getattr(config, setting), change, prefix=f"{name}.")
            if is_group
            else _parse(change, hints[setting], name)
        )
    return dataclasses.replace(config, **changed)


def _settings(config: Any) -> Iterable[str]:
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if dataclasses.is_dataclass(value):
            yield from (f"{setting.name}.{inner}" for inner in _settings(value))
        else:
            yield setting.name


def _parse(text: str, hint: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if text not in arguments:
            raise ConfigError(f"{name}: expected one of {', '.join(arguments)}, got {text!r}")
        return text
    if origin is tuple:
        items = text.strip("()[] ").split(",")
        return tuple(_parse(item.strip(), arguments[0], name) for item in items if item.strip())
    if origin in (Union, UnionType):
        if text.lower() == "none":
            return None
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return _parse(text, inner, name)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{name}: expected true or false, got {text!r}")
        return text.lower() == "true"
    if hint is str:
        return text
    try:
        number = hint(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        kind = "a whole number" if hint is int else "a finite number"
        raise ConfigError(f"{name}: expected {kind}, got {text!r}")
    return number
