# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled operators: ``_C`` (CPU, always built) and ``_C_cuda<major>`` (where it was
built and torch has CUDA of that major version), and says why one is not active."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path

import torch

_OLDEST_TORCH = (2, 10)  # the stable ABI version that the libraries are compiled against


def _load_cpu() -> str | None:
    if importlib.util.find_spec("fastresnet._C") is None:
        return "fastresnet was not built here: no fastresnet._C beside the package (pip install .)"
    try:
        importlib.import_module("fastresnet._C")
    except ImportError as error:
        return f"fastresnet._C does not load: {error}"
    torch.ops.fastresnet.isa()  # reads FASTRESNET_ISA; refused here rather than at the first call
    return None


def _load_cuda() -> str | None:
    if _cpu_unloaded is not None:
        return _cpu_unloaded
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    name = f"fastresnet._C_cuda{torch.version.cuda.split('.')[0]}"
    if importlib.util.find_spec(name) is None:
        reason = build_info().get("cuda_reason") or "unknown"
        return f"fastresnet was built without CUDA {torch.version.cuda} ({reason})"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} does not load: {error}"
    return None


def build_info() -> dict:
    """What was built, as ``setup.py`` wrote it: version, compiler, torch, CUDA or why not."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def is_active(device_type: str) -> bool:
    """Whether the operators run on ``device_type`` ("cpu", "cuda") through our kernels."""
    return _active.get(device_type, False)


def takes(device: torch.device) -> bool:
    """Whether tensors on ``device`` go through our kernels. That those on a GPU do not, for want of
    the CUDA library, is said once.

    Raises:
        RuntimeError: the CUDA library has no code for that GPU.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        if _active["cuda"]:
            _check_architecture(device.index)
        elif cuda_missing is _cuda_unloaded:  # not for being switched off
            _warn_of_plain_cuda()
    return is_active(device.type)


@functools.cache
def _check_architecture(index: int | None) -> None:
    capability = torch.cuda.get_device_capability(index)
    built = build_info().get("cuda_arch_list")
    if not has_code(capability, built):
        wanted = ".".join(map(str, capability))
        raise RuntimeError(
            f"fastresnet's CUDA library: expected code for GPU {index} of compute capability "
            f"{wanted}, got code for {built}; build it with TORCH_CUDA_ARCH_LIST={wanted}, or set "
            "FASTRESNET_DISABLE=1 to run on plain torch"
        )


def has_code(capability: tuple[int, int], built: str | None) -> bool:
    """Whether a library built for ``built``, as in TORCH_CUDA_ARCH_LIST, runs on such a GPU: its
    machine code on later minor versions of its major one, its PTX on all later versions."""
    if not built or "native" in built.lower():
        return True  # whatever was there when it was built
    for entry in built.replace(";", " ").split():
        number, _, ptx = entry.partition("+")
        exact = number[-1].isalpha()  # as in 9.0a, which is for that version only
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if exact and capability == (major, minor):
            return True
        if not exact and (capability[0] == major and capability[1] >= minor):
            return True
        if not exact and ptx and capability >= (major, minor):
            return True
    return False


@functools.cache
def _warn_of_plain_cuda() -> None:
    warnings.warn(f"fastresnet runs on plain torch on GPUs: {cuda_missing}", stacklevel=4)


def _refuse_cuda(*_: object) -> None:
    raise RuntimeError(f"expected an operator of fastresnet on CUDA, got none: {_cuda_unloaded}")


def _disabled() -> str | None:
    value = os.environ.get("FASTRESNET_DISABLE", "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTRESNET_DISABLE must be 0 or 1, got {value!r}")
    return "FASTRESNET_DISABLE=1" if value == "1" else None


_version = tuple(int(part) for part in torch.__version__.split(".")[:2])
if _version < _OLDEST_TORCH:
    _needed = ".".join(map(str, _OLDEST_TORCH))
    raise ImportError(f"fastresnet needs torch {_needed} or newer, found {torch.__version__}")

_cpu_unloaded = _load_cpu()
_cuda_unloaded = _load_cuda()
has_schemas = _cpu_unloaded is None

# Why the kernels of a device are not active; None where they are.
cpu_missing: str | None = _disabled() or _cpu_unloaded
cuda_missing: str | None = _disabled() or _cuda_unloaded

if _cpu_unloaded is not None:
    warnings.warn(f"fastresnet runs on plain torch: {_cpu_unloaded}", stacklevel=2)

# The ISA level in use, "" where the CPU library is not loaded.
cpu_level: str = torch.ops.fastresnet.isa() if has_schemas else ""

_active = {"cpu": cpu_missing is None, "cuda": cuda_missing is None}

if has_schemas and _cuda_unloaded is not None:
    # A tensor on a GPU then gets the reason, rather than the dispatcher's list of backends.
    _refusals = torch.library.Library("fastresnet", "IMPL")
    for _name in torch._C._dispatch_get_all_op_names():
        if _name.startswith("fastresnet::"):
            _refusals.impl(_name.removeprefix("fastresnet::"), _refuse_cuda, "CUDA")
