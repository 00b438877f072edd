# SPDX-License-Identifier: Apache-2.0
"""Weights of an earlier training, from torchvision or from a file, into a model with a head of its
own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torchvision.models import WeightsEnum

__all__ = ["WeightsError", "load_pretrained"]

# Under which names training scripts keep the weights within their checkpoints.
_ENTRIES = ("model", "state_dict")
# What weights written before torch 0.4.1, among them some of torchvision's, do not have.
_OPTIONAL = ".num_batches_tracked"
_SHOWN = 3  # of the keys of each kind, in a message


class WeightsError(ValueError):
    """Weights cannot be had, or belong to another model."""


def load_pretrained(model: nn.Module, weights: WeightsEnum | str | Path) -> tuple[str, ...]:
    """Loads ``weights`` into ``model``, but for its last linear layer where that one has other
    sizes, as with another number of classes.

    Args:
        model: any module.
        weights: a member of torchvision's enums, such as ``ResNet18_Weights.IMAGENET1K_V1``, or its
            name; or the path of a file of safetensors (``.safetensors``) or of ``torch.save`` (any
            other suffix). The latter may be a checkpoint that keeps the weights as ``model`` or
            ``state_dict``, and keys may begin with ``module.``; it is read with
            ``weights_only=True``, which runs no code.

    Returns:
        The keys that were not loaded and keep their values: the last linear layer's, or none.

    Raises:
        WeightsError: there is no such file or name, the file is damaged or holds other things than
            tensors, or keys or shapes are not the model's. The model is then as it was.
    """
    source, state = _read(weights)
    expected = model.state_dict()
    head = _head_keys(model)
    if any(key in state and state[key].shape != expected[key].shape for key in head):
        state = {key: tensor for key, tensor in state.items() if key not in head}
    else:
        head = ()
    required = (key for key in expected if not key.endswith(_OPTIONAL) and key not in head)
    problems = [
        _listed("missing", (key for key in required if key not in state)),
        _listed("unexpected", (key for key in state if key not in expected)),
        _listed(
            "of another shape",
            (
                f"{key} of {_shape(tensor)} instead of {_shape(expected[key])}"
                for key, tensor in state.items()
                if key in expected and tensor.shape != expected[key].shape
            ),
        ),
    ]
    if any(problems):
        raise WeightsError(
            f"{source}: expected the weights of this {type(model).__name__}, got keys "
            + "; ".join(filter(None, problems))
        )
    model.load_state_dict(state, strict=False)
    return head


def _head_keys(model: nn.Module) -> tuple[str, ...]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(key for key in model.state_dict() if key.rpartition(".")[0] in names[-1:])


def _listed(kind: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    more = [f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
    return f"{kind}: {', '.join(keys[:_SHOWN] + more)}" if keys else ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single value"


def _read(weights: WeightsEnum | str | Path) -> tuple[str, Mapping[str, Tensor]]:
    """What to call the weights in a message, and the weights."""
    if not isinstance(weights, WeightsEnum) and Path(weights).is_file():
        return str(weights), _read_file(Path(weights))
    member = weights if isinstance(weights, WeightsEnum) else _member(str(weights))
    try:
        return str(member), member.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network; a file whose hash is another
        raise WeightsError(
            f"{member}: expected to get the weights from {member.url}, got: {error}"
        ) from error


def _member(name: str) -> WeightsEnum:
    try:
        return torchvision.models.get_weight(name)
    except (ValueError, KeyError) as error:
        raise WeightsError(
            "weights: expected a file, or a name such as ResNet18_Weights.IMAGENET1K_V1, got "
            f"{name!r}"
        ) from error


def _read_file(path: Path) -> Mapping[str, Tensor]:
    try:
        state: Any = (
            _load_safetensors(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except ImportError:
        raise
    except Exception as error:  # either library raises half a dozen types for a damaged file
        raise WeightsError(f"{path}: expected a file of tensors, got: {error}") from error
    if isinstance(state, Mapping):
        state = next((state[e] for e in _ENTRIES if isinstance(state.get(e), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise WeightsError(f"{path}: expected a state_dict of tensors, got {_contents(state)}")
    state = dict(state)
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def _load_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file  # of the extra "train", so only where it is needed

    return load_file(path)


def _contents(state: Any) -> str:
    if isinstance(state, Mapping):
        return f"a dictionary of {', '.join(map(str, list(state)[:_SHOWN]))}"
    return type(state).__name__
