# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent, and that run no code when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastresnet.files import write_atomically


class CheckpointError(ValueError):
    """A checkpoint is damaged or belongs to another model."""


def save_weights(path: Path, model: nn.Module, *, metadata: dict[str, str] | None = None) -> None:
    """Writes the parameters and buffers as safetensors, under their ``state_dict`` names."""
    # safetensors stores rows in order, so channels_last weights are written as plain NCHW.
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads weights of :func:`save_weights` into a model with the same names and shapes.

    Raises:
        CheckpointError: the file is damaged, or names or shapes differ.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got: {error}") from error
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: expected the weights of this model, got: {error}"
        ) from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain Python values."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path: Path) -> dict[str, Any]:
    """Reads a file of :func:`save_state`, onto the CPU.

    Raises:
        CheckpointError: the file is damaged or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise CheckpointError(f"{path}: expected a training state, got: {error}") from error
