# SPDX-License-Identifier: Apache-2.0
"""How long a step takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Clock(Protocol):
    def __call__(self, step: Callable[[], Any]) -> float:
        """Does the step, once or several times, and returns the seconds of one."""


def host_clock(step: Callable[[], Any]) -> float:
    """For a device that is done when the step returns."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@dataclass(frozen=True)
class TurnClock:
    """The mean of several steps, for providers that have threads of their own, on the CPU.

    OpenMP's threads, and ONNX Runtime's, spin for a while after a run and take the cores from the
    provider whose turn is next: a turn begins with a pause, in which they go to sleep. The step
    after that is not timed: it wakes the threads of this provider and fills the caches. What is
    timed goes on for long enough that a short step is not left to chance.

    Args:
        pause: seconds before the turn.
        least: seconds that the timed steps take at least, together.
    """

    pause: float = 0.1
    least: float = 0.2

    def __call__(self, step: Callable[[], Any]) -> float:
        time.sleep(self.pause)
        step()
        steps, seconds, start = 0, 0.0, time.perf_counter()
        while steps == 0 or seconds < self.least:
            step()
            steps, seconds = steps + 1, time.perf_counter() - start
        return seconds / steps


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
