# SPDX-License-Identifier: Apache-2.0
"""How long a step takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Clock(Protocol):
    def __call__(self, step: Callable[[], Any]) -> float:
        """Does the step and returns its seconds."""


def host_clock(step: Callable[[], Any]) -> float:
    """For a device that is done when the step returns."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class EventClock:
    """CUDA events around the step on torch's current stream: what the GPU does for it and what it
    waits for on the way, but neither the way to the GPU nor back.

    Args:
        event: makes an event, ``torch.cuda.Event`` or one like it.
        synchronize: waits until the device is idle.
    """

    def __init__(
        self,
        event: Callable[..., Any] = torch.cuda.Event,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
    ) -> None:
        self._event, self._synchronize = event, synchronize

    def __call__(self, step: Callable[[], Any]) -> float:
        start, end = (self._event(enable_timing=True) for _ in range(2))
        self._synchronize()
        start.record()
        step()
        end.record()
        self._synchronize()
        return start.elapsed_time(end) / 1e3  # milliseconds


def clock_of(device: str) -> Clock:
    return host_clock if device == "cpu" else EventClock()
