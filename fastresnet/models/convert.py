# SPDX-License-Identifier: Apache-2.0
"""``convert(model)`` fuses a model in place, ``revert(model)`` undoes it.

Both only change the class of modules, so parameters, buffers, hooks, the identity of every object
and everything that refers to them (an optimiser, DDP) stay. Three kinds of class are known:
torchvision's blocks and networks, ``nn.Sequential`` and its subclasses without a ``forward`` of
their own, and classes whose methods were written by hand, which ``rewrite.py`` handles.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torchvision.models import resnet

from ..nn import BasicBlock, Bottleneck, FusedSequential
from ..nn.batch_norm import add_relu, fused_call
from ..nn.blocks import shortcut
from .rewrite import ChildNames, rewritten_methods

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ClassT = TypeVar("ClassT", bound=type)
P = ParamSpec("P")

_fused_classes: dict[type, type] = {
    nn.Sequential: FusedSequential,
    resnet.BasicBlock: BasicBlock,
    resnet.Bottleneck: Bottleneck,
}


def fuses(original: type[nn.Module]) -> Callable[[ClassT], ClassT]:
    """Class decorator: ``convert`` turns modules of exactly ``original`` into this subclass."""

    def register(fused: ClassT) -> ClassT:
        _fused_classes[original] = fused
        return fused

    return register


def convert(model: ModuleT) -> ModuleT:
    """Makes every part of ``model`` that the fused operators can run use them, in place.

    That is: torchvision's ResNet and VGG and their blocks, batch norm (and ReLU) in
    ``nn.Sequential``, and in modules written by hand the calls ``relu(self.bn(x))`` and
    ``relu(self.bn(x) + y)`` in their usual spellings. Anything else is left alone. Parameters,
    buffers, ``state_dict`` keys and hooks stay; calling it twice changes nothing.

    Args:
        model: any module.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_is_module(model)
    for module in model.modules():
        fused = _fused_class(type(module), ChildNames.of(module))
        if fused is not None:
            module.__class__ = fused
    return model


def revert(model: ModuleT) -> ModuleT:
    """Gives every fused module its original class back, in place.

    Applied to a model of :mod:`fastresnet.models` it leaves torchvision's own.

    Args:
        model: any module.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_is_module(model)
    originals = {fused: original for original, fused in _fused_classes.items()}
    for module in model.modules():
        cls = type(module)
        original = cls.__mro__[2] if cls.__mro__[1] is _Fused else originals.get(cls)
        if original is not None:
            module.__class__ = original
    return model


@functools.cache
def _fused_class(cls: type[nn.Module], children: ChildNames) -> type[nn.Module] | None:
    """The class that runs ``cls``'s modules with such children fused, or None if it is the same."""
    is_sequential = issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward
    if not children.batch_norms and (is_sequential or cls not in _fused_classes):
        return None
    if cls in _fused_classes:
        return _fused_classes[cls]
    if issubclass(cls, (_Fused, *_fused_classes.values())):
        return None
    if is_sequential:
        methods = {"forward": FusedSequential.forward}
    else:
        methods = rewritten_methods(cls, children)
    if not methods:
        return None
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (_Fused, cls), {**methods, **names})


class _Fused:
    """First base of the classes made here; the second is the original."""

    # What rewritten methods call; see rewrite.py.
    _fused_call = staticmethod(fused_call)
    _fused_add_relu = staticmethod(add_relu)
    _fused_shortcut = staticmethod(shortcut)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class has no importable name: pickle and deepcopy make it again from the original.
        function, arguments, *state = super().__reduce_ex__(max(2, protocol))
        if function is copyreg.__newobj__:
            function, arguments = _new_fused, (type(self).__mro__[2], ChildNames.of(self))
        return function, arguments, *state


def _new_fused(original: type[nn.Module], children: ChildNames) -> nn.Module:
    cls = _fused_class(original, children) or original
    return cls.__new__(cls)


def fused_builder(builder: Callable[P, nn.Module], module: str) -> Callable[P, nn.Module]:
    """torchvision's ``builder``, its result converted, as a function of ``module``."""

    @functools.wraps(builder)
    def build(*args: P.args, **kwargs: P.kwargs) -> nn.Module:
        return convert(builder(*args, **kwargs))

    build.__module__ = module
    return build


def scriptable_twin(model: ModuleT) -> ModuleT:
    """A reverted copy that shares ``model``'s tensors: what ``torch.jit.script`` can compile."""
    tensors = (*model.parameters(), *model.buffers())
    return revert(copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}))


def _check_is_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
