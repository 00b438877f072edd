# SPDX-License-Identifier: Apache-2.0
"""What a program runs on: versions, what was built, and which paths are active and why.

Nothing here raises: where a fact cannot be had, it says so in that fact's place.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch

import fastresnet
from fastresnet import _extension, ops
from fastresnet.data.selection import choose_backend

# Read by the package or its build; the first three act at run time.
_VARIABLES = {
    "FASTRESNET_DISABLE": "1 switches every kernel off: plain torch everywhere",
    "FASTRESNET_ISA": "forces a CPU level: default, avx2, avx512, avx512_bf16, amx",
    "FASTRESNET_CONV_GRAPHS": "1 takes cuDNN's graphs wherever they are, 0 never, auto the faster",
    "FASTRESNET_CUDA": "build with CUDA: auto, 0, 1",
    "TORCH_CUDA_ARCH_LIST": "build: GPU architectures",
    "OMP_NUM_THREADS": "CPU threads of torch and of the kernels",
}
# How each data backend's distributions are called.
_DATA_BACKENDS = {
    "torchvision": ("torchvision",),
    "DALI": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "simplejpeg": ("simplejpeg",),
}


def environment() -> dict[str, dict[str, Any]]:
    """The facts, by section and name, as plain values for JSON."""
    return {
        "versions": {
            "fastresnet": fastresnet.__version__,
            "torch": torch.__version__,
            "torchvision": _version("torchvision"),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "machine": {
            "cpu": _attempt(lambda: torch.cpu.get_capabilities()["cpu_name"]),
            "threads": torch.get_num_threads(),
            "gpu": _attempt(_gpus),
        },
        "build": _attempt_section(_extension.build_info),
        "kernels": {
            "cpu": _path(_extension.cpu_missing),
            "cpu level": _attempt(lambda: torch.ops.fastresnet.isa()),
            "cpu levels here": _attempt(lambda: list(torch.ops.fastresnet.isa_levels())),
            "cuda": _path(_extension.cuda_missing),
        },
        "convolution graphs": _attempt_section(_conv_graphs),
        "data backends": {
            name: _first_version(distributions) for name, distributions in _DATA_BACKENDS.items()
        }
        | {
            f"files for a {device}": _attempt(partial(_backend_for, kind))
            for device, kind in (("CPU", "cpu"), ("GPU", "cuda"))
        },
        "variables": {
            name: os.environ.get(name) or f"unset ({meaning})"
            for name, meaning in _VARIABLES.items()
        },
    }


def _path(missing: str | None) -> str:
    return "active" if missing is None else f"not active: {missing}"


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _conv_graphs() -> dict[str, str]:
    """What was timed at first use, in any process, and taken."""
    shown = {
        f"{device}: {problem}": f"{'fused' if choice.fused else 'apart'} ({choice.reason})"
        for device, problems in ops.choice.choices().items()
        for problem, choice in problems.items()
    }
    return shown or {"timed so far": "none"}


def _backend_for(kind: str) -> str:
    name, reason = choose_backend("auto", torch.device(kind))
    return f"{name} ({reason})"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first_version(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        if (version := _version(distribution)) is not None:
            return f"{version} ({distribution})"
    return f"not installed (pip install {distributions[0]})"


def _attempt(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    except Exception as error:  # whatever is broken here is what the reader needs to see
        return (
            f"unknown ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )


def _attempt_section(facts: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    value = _attempt(facts)
    return value if isinstance(value, dict) else {"facts": value}
