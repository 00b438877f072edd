# SPDX-License-Identifier: Apache-2.0
"""Folds: what inference makes of modules' weights, once, and keeps until those change.

A change is another tensor, another version of it, a step of an optimiser (torch's fused ones leave
the version as it is), another setting or class, a hook, ``train()``, ``eval()``, ``to()``, a
forward with gradients. What escapes all of these, such as a write through ``.data`` or the replay
of a captured training step between two inferences, is noticed at the next ``eval()``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .batch_norm import has_hooks


class Kind(NamedTuple):
    """What a class of modules computes with."""

    settings: Callable[[nn.Module], tuple[Any, ...]]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...] = ()


_KINDS: dict[type[nn.Module], Kind] = {
    nn.Conv2d: Kind(
        attrgetter(
            *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
            *("groups", "padding_mode"),
        ),
        ("weight", "bias"),
    ),
    nn.BatchNorm2d: Kind(
        attrgetter("num_features", "eps", "training"),
        ("weight", "bias"),
        # The last because torch's training moves the others without a new version.
        ("running_mean", "running_var", "num_batches_tracked"),
    ),
    nn.Linear: Kind(attrgetter("in_features", "out_features"), ("weight", "bias")),
}


class TensorSource(NamedTuple):
    """A tensor as it was. It was kept, and a second one on its memory, so that neither can be
    another's by now."""

    name: str
    tensor: Tensor | None
    version: int
    alias: Tensor | None

    @classmethod
    def of(cls, name: str, tensor: Tensor | None) -> TensorSource:
        if tensor is None:
            return cls(name, None, 0, None)
        return cls(name, tensor, tensor._version, tensor.detach())


class Source(NamedTuple):
    """A module as it was when something was made of it."""

    module_class: type[nn.Module]
    settings: tuple[Any, ...]
    attributes: int
    parameters: tuple[TensorSource, ...]
    buffers: tuple[TensorSource, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Source:
        kind = _KINDS[type(module)]
        parameters, buffers = (
            tuple(TensorSource.of(name, getattr(module, name)) for name in names)
            for names in (kind.parameters, kind.buffers)
        )
        # Copied because a stride may be a list, and be written to. The attributes are counted
        # because one more could stand in front of a parameter.
        settings = deepcopy(kind.settings(module))
        return cls(type(module), settings, len(vars(module)), parameters, buffers)

    def is_still(self, module: nn.Module) -> bool:
        """Whether ``module`` does what it did."""
        module_class, settings, attributes, parameters, buffers = self
        return (
            type(module) is module_class
            and not has_hooks(module)
            and len(vars(module)) == attributes
            and _KINDS[module_class].settings(module) == settings
            and _are_still(parameters, module._parameters)
            and _are_still(buffers, module._buffers)
        )


def _are_still(sources: tuple[TensorSource, ...], registered: Mapping[str, Any]) -> bool:
    """Not by ``nn.Module``'s attributes, which take ten times as long: a tensor that is not
    registered, but a plain attribute, counts as changed."""
    for name, source, version, alias in sources:
        tensor = registered.get(name)
        if tensor is not source:
            return False
        if tensor is not None and (tensor._version != version or not alias.is_set_to(tensor)):
            return False
    return True


def _tensors(module: nn.Module) -> list[Tensor]:
    kind = _KINDS[type(module)]
    tensors = (getattr(module, name) for name in (*kind.parameters, *kind.buffers))
    return [tensor for tensor in tensors if tensor is not None]


@dataclass(eq=False)
class _Entry:
    fold: Any
    sources: list[Source]

    def clear(self) -> None:
        """Other modules have the entry too."""
        self.fold, self.sources = None, []


# By each module that a fold was made of; the first one's is looked up, all forget it.
_entries: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry]] = WeakKeyDictionary()


def recall_fold(modules: Sequence[nn.Module], key: Hashable) -> Any | None:
    """What :func:`keep_fold` was given for these modules, if they are as they were."""
    if type(modules[0]) not in _KINDS:
        return None
    entry = _entries.get(modules[0], {}).get(key)
    if entry is None or len(entry.sources) != len(modules):
        return None
    for source, module in zip(entry.sources, modules, strict=True):
        if not source.is_still(module):
            return None
    return entry.fold


def keep_fold(modules: Sequence[nn.Module], key: Hashable, fold: Any) -> None:
    """Keeps ``fold``, made of ``modules``, in place of what was kept for them by this key.

    Not kept is what was made of tensors without versions, those of ``torch.inference_mode()``.
    """
    if any(tensor.is_inference() for module in modules for tensor in _tensors(module)):
        return
    entry = _Entry(fold, [Source.of(module) for module in modules])
    for module in modules:
        _entries.setdefault(module, {})[key] = entry


def forget_folds(module: nn.Module) -> None:
    """Drops what was made of any module in ``module``."""
    if torch.compiler.is_compiling() or not _entries:
        return
    for child in module.modules():
        _forget(child)


class Foldable(nn.Module):
    """A module whose folds are made anew after ``train()``, ``eval()`` and ``to()``."""

    def train(self, mode: bool = True) -> Foldable:
        forget_folds(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Foldable:
        forget_folds(self)
        return super()._apply(fn, recurse)


def _forget(module: nn.Module) -> None:
    for entry in _entries.pop(module, {}).values():
        entry.clear()


def _forget_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _entries:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in list(_entries):
        if any(id(parameter) in stepped for parameter in module.parameters(recurse=False)):
            _forget(module)


register_optimizer_step_post_hook(_forget_stepped)
