# SPDX-License-Identifier: Apache-2.0
"""Settings as text and as JSON: one changed by its dotted name, or all of them read back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastresnet.train.config import ConfigError, Recipe


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


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that :func:`fastresnet.train.config.to_dict` made ``values`` of, also when these
    have been through JSON.

    Raises:
        ConfigError: a setting is missing, unknown, or out of its range.
    """
    return _build(Recipe, values, name="the configuration")


def _build(kind: type, values: Any, *, name: str) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or set(values) != set(hints):
        got = ", ".join(values) if isinstance(values, dict) else repr(values)
        raise ConfigError(f"{name}: expected the settings {', '.join(hints)}, got {got}")
    built = {
        setting: _build(hints[setting], value, name=setting)
        if dataclasses.is_dataclass(hints[setting])
        else (tuple(value) if isinstance(value, list) else value)
        for setting, value in values.items()
    }
    return _named(lambda: kind(**built), name)


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
    return _named(lambda: dataclasses.replace(config, **changed), prefix.rstrip("."))


def _named(build: Any, name: str) -> Any:
    """What ``build`` returns; errors of groups that other layers define, with the group's name."""
    try:
        return build()
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


def _settings(config: Any) -> Iterable[str]:
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if dataclasses.is_dataclass(value):
            yield from (f"{setting.name}.{inner}" for inner in _settings(value))
        else:
            yield setting.name


def _parse(text: str, hint: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if NoneType in arguments and text.lower() == "none":
            return None
        errors = []
        for argument in arguments:
            if argument is not NoneType:
                try:
                    return _parse(text, argument, name)
                except ConfigError as error:
                    errors.append(error)
        raise errors[0]
    if origin is Literal:
        if text not in arguments:
            raise ConfigError(f"{name}: expected one of {', '.join(arguments)}, got {text!r}")
        return text
    if origin is tuple:
        items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
        if Ellipsis not in arguments and len(items) != len(arguments):
            raise ConfigError(f"{name}: expected {len(arguments)} values, got {text!r}")
        return tuple(_parse(item, arguments[0], name) for item in items)
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
