# SPDX-License-Identifier: Apache-2.0
"""Chooses the device and the number format of the matrix products."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}


def resolve_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to train on; "auto" takes a GPU where there is one."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU that torch can use, got none")
    return torch.device(choice)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are instructions of the device, rather than emulated.

    Without them autocast is several times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_amp(
    choice: Literal["auto", "bf16", "fp16", "none"], device: torch.device
) -> torch.dtype | None:
    """The type of autocast on this device, or None for none."""
    if choice == "auto":
        choice = "bf16" if computes_in_bf16(device) else "none"
    return _AMP[choice]


def amp_name(dtype: torch.dtype | None) -> str:
    """What a configuration calls the type of autocast."""
    return next(name for name, known in _AMP.items() if known is dtype)


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager:
    """Autocast to ``dtype`` on the device; does nothing where it is None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
