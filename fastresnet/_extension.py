# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled operators: ``_C`` (CPU, always built) and ``_C_cuda<major>`` (where it was
built and torch has CUDA of that major version), and says why one is not active."""

from __future__ import annotations

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
