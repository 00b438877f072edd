# SPDX-License-Identifier: Apache-2.0
"""Which of two ways to the same result is the faster one on a GPU: found out where a size is first
met, remembered, and told by ``fastresnet info``.

One way is fused: a convolution and its neighbours as one graph of cuDNN. The other takes a
convolution and a kernel of ours. Before the two are timed their results are compared, on random
numbers: a fused one that is not there, fails or comes out otherwise is never used, and the record
says so.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _extension
from ..files import write_atomically

DTYPES = (torch.bfloat16, torch.float16)
DEVICES = ("cuda",)
_POLICIES = {"auto": "timed", "1": "always", "0": "never"}
# Eight roundings, in the norm of a result; what is computed otherwise differs by one or two.
_TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
_CALLS, _ROUNDS = 10, 3


class Choice(NamedTuple):
    """Whether the fused way is taken, and why."""

    fused: bool
    reason: str


def _policy_from_environment() -> str:
    value = os.environ.get("FASTRESNET_CONV_GRAPHS") or "auto"
    if value not in _POLICIES:
        raise ValueError(f"FASTRESNET_CONV_GRAPHS must be auto, 0 or 1, got {value!r}")
    return _POLICIES[value]


# "timed": the faster way. "always": the fused way wherever it is there and right, not timed.
# "never": always apart.
policy = _policy_from_environment()

_choices: dict[tuple[str, str, str], Choice] = {}  # policy, device, problem
_known: dict[tuple, Choice] = {}  # the same by what choose() sees, so that it need not be described
_has_run: set[tuple] = set()  # of its keys, those whose fused way this process has taken
_lock = threading.Lock()
_read = False


def choose(name: str, fused: Callable, apart: Callable, arguments: tuple[Any, ...]) -> Any:
    """What ``fused(*arguments)`` and ``apart(*arguments)`` both return, by the faster one.

    Args:
        name: of the problem; with the sizes in ``arguments`` it is the key.
        fused: raises RuntimeError where there is no such way.
        apart: runs always.
        arguments: the first is a tensor on the device; the others tensors, numbers or None.
    """
    device = arguments[0].device
    if policy == "never" or not _may_fuse(arguments):
        return apart(*arguments)
    key = (policy, device, name, *map(_part, arguments))
    # While a CUDA graph is captured nothing may be timed, planned or loaded.
    if _is_capturing(device):
        way = fused if key in _has_run else apart
        return way(*arguments)
    choice = _known.get(key) or _choice(key, fused, apart, arguments)
    if not choice.fused:
        return apart(*arguments)
    result = fused(*arguments)
    _has_run.add(key)
    return result


def choices() -> dict[str, dict[str, Choice]]:
    """Device -> problem -> what was chosen by timing, in this process or an earlier one."""
    _read_file()
    found: dict[str, dict[str, Choice]] = {}
    for (under, device, problem), choice in sorted(_choices.items()):
        if under == "timed":
            found.setdefault(device, {})[problem] = choice
    return found


def file() -> Path:
    """Where choices are remembered."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "fastresnet", "conv_graphs.json")


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _may_fuse(arguments: tuple[Any, ...]) -> bool:
    x = arguments[0]
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return (
        x.device.type in DEVICES
        and _extension.is_active(x.device.type)
        and x.dtype in DTYPES
        # cuDNN's sums are added up in any order.
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.backends.cudnn.deterministic
        and torch.backends.cudnn.enabled
        and all(value.data_ptr() % 16 == 0 for value in tensors)
    )


def _part(value: Any) -> Any:
    """What a problem depends on: the dtype and sizes of a map or weight, and whole numbers."""
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.dtype, value.shape
    return value if type(value) is int else None


def _described(key: tuple) -> str:
    """The dtype, the sizes of all maps and weights, and the whole numbers."""
    _policy, _device, name, *parts = key
    words = [name, str(parts[0][0]).removeprefix("torch.")]
    for part in parts:
        if isinstance(part, tuple):
            words.append("x".join(map(str, part[1])))
        elif part is not None:
            words.append(str(part))
    return " ".join(words)


@functools.cache
def _device_name(device: torch.device) -> str:
    """All that a choice depends on but the problem itself."""
    if device.type != "cuda":
        return device.type
    return (
        f"{torch.cuda.get_device_name(device)}, cuDNN {torch.backends.cudnn.version()}, "
        f"torch {torch.__version__}, fastresnet {_extension.build_info().get('version')}"
    )


def _choice(key: tuple, fused: Callable, apart: Callable, arguments: tuple[Any, ...]) -> Choice:
    described = (policy, _device_name(key[1]), _described(key))
    with _lock:
        _read_file()
        if described not in _choices:
            choice = _try(fused, apart, arguments)
            if choice is None:
                return Choice(False, "not enough memory to try")
            _choices[described] = choice
            if policy == "timed":
                _write_file()
        _known[key] = _choices[described]
        return _known[key]


def _try(fused: Callable, apart: Callable, arguments: tuple[Any, ...]) -> Choice | None:
    """Runs both ways on random numbers; None where there is no memory for that now."""
    device = arguments[0].device
    generator = torch.Generator(device).manual_seed(0)
    sample = tuple(_like(value, generator) for value in arguments)
    expected = apart(*sample)
    try:
        found = fused(*sample)
        error = max(map(_difference, _tensors(found), _tensors(expected)))
    except RuntimeError as reason:
        if "out of memory" in str(reason):
            return None
        return Choice(False, f"not possible: {str(reason).splitlines()[0]}")
    if not error <= _TOLERANCE[arguments[0].dtype]:  # nor NaN
        return Choice(False, f"differs from what it should be by {error:.2g}")
    if policy == "always":
        return Choice(True, "asked for")
    rounds = [
        [_milliseconds(lambda way=way: way(*sample), device) for way in (fused, apart)]
        for _ in range(_ROUNDS)
    ]
    fused_time, apart_time = (min(times) for times in zip(*rounds, strict=True))
    return Choice(fused_time < apart_time, f"{fused_time:.4f} ms fused, {apart_time:.4f} apart")


def _like(value: Any, generator: torch.Generator) -> Any:
    """Random numbers in a tensor's place: normal in maps, 0.5 to 1.5 in vectors, any bits."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.uint8:
        # In front of as much room as a reader of whole bytes would want: such a reader is noticed
        # by its result, not by where it reads.
        room = torch.zeros(8 * value.numel(), dtype=torch.uint8, device=value.device)
        bits = room[: value.numel()].view(value.shape)
        return bits.random_(0, 256, generator=generator)
    if value.dim() == 1:
        return torch.rand(value.shape, generator=generator, device=value.device) + 0.5
    return torch.empty_like(value).normal_(generator=generator)


def _tensors(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [tensor for tensor in results if tensor is not None]


def _difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of the result."""
    expected = expected.double()
    norm = expected.norm().item()
    return (found.double() - expected).norm().item() / norm if norm > 0 else float("inf")


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call on a GPU among several, one behind another."""
    with torch.cuda.device(device):
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_CALLS):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / _CALLS


def _read_file() -> None:
    global _read
    if _read:
        return
    _read = True
    for device, problems in _stored().items():
        for problem, (fused, reason) in problems.items():
            _choices.setdefault(("timed", device, problem), Choice(fused, reason))


def _stored() -> dict[str, dict[str, list]]:
    try:
        return json.loads(file().read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"fastresnet does not read {file()}: {error}", stacklevel=2)
        return {}


def _write_file() -> None:
    """Adds what is known here to what other processes have written meanwhile."""
    stored = _stored()
    for (under, device, problem), choice in _choices.items():
        if under == "timed":
            stored.setdefault(device, {})[problem] = list(choice)
    text = json.dumps(stored, indent=1, sort_keys=True) + "\n"
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file(), lambda path: path.write_text(text))
    except OSError as error:
        warnings.warn(f"fastresnet cannot write {file()}: {error}", stacklevel=2)
