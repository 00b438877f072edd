# SPDX-License-Identifier: Apache-2.0
"""Batches from the host to the device, one ahead of the one in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def to_device(
    batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Moves each batch to the device; to a GPU while the one before it is being used."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    ahead: tuple[Tensor, Tensor] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
        if ahead is not None:
            yield ahead
        # Only now: work that the consumer has queued in between need not wait for this copy.
        torch.cuda.current_stream(device).wait_stream(copies)
        for tensor in moved:
            tensor.record_stream(torch.cuda.current_stream(device))
        ahead = moved
    if ahead is not None:
        yield ahead
