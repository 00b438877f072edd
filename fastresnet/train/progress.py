# SPDX-License-Identifier: Apache-2.0
"""Progress within an epoch: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_T = TypeVar("_T")

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_READS = 0.5


def speed(images_per_second: float) -> str:
    """Images a second in words: whole ones, or tenths where they are few."""
    digits = 0 if images_per_second >= 10 else 1
    return f"{images_per_second:.{digits}f} images/s"


class EpochProgress(AbstractContextManager):
    """Shows steps done, images per second and a short note, and says when a note is wanted.

    Args:
        console: where to print; a bar is drawn only if it is a terminal.
        title: what is in progress, as in "epoch 1/2 train".
        steps: steps in all.
        done: how many of them were done before.
    """

    def __init__(self, console: Console, title: str, steps: int, *, done: int = 0) -> None:
        self._console = console
        self._title = title
        self._steps = steps
        self._done = done
        self._here = 0
        self.waited = 0.0  # seconds in which there was no batch to work on
        self._images = 0
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=steps, completed=done, note="")
        self._interval = _SECONDS_BETWEEN_READS if self._bar else _SECONDS_BETWEEN_LINES

    def __enter__(self) -> EpochProgress:
        if self._bar:
            self._bar.start()
        self._begin = self._last = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begin

    @property
    def images(self) -> int:
        """Images since the start."""
        return self._images

    @property
    def images_per_second(self) -> float:
        """Images a second since the start."""
        return self._images / max(self.seconds, 1e-9)

    def timed(self, batches: Iterable[_T]) -> Iterator[_T]:
        """The batches, the time until each is there counted in ``waited``."""
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - begin
            yield batch

    def advance(self, images: int) -> bool:
        """Counts a step of ``images`` images; True where it is time to :meth:`show` a note."""
        self._done += 1
        self._here += 1
        self._images += images
        if self._bar:
            self._bar.advance(self._task)
        now = time.perf_counter()
        if now - self._last < self._interval:
            return False
        self._last = now
        return True

    def show(self, note: str) -> None:
        """Shows the note beside the steps, the speed, and the share of time spent waiting."""
        waiting = self.waited / max(self.seconds, 1e-9)
        text = f"{speed(self.images_per_second)}  data {waiting:.0%}  {note}"
        if self._bar:
            self._bar.update(self._task, note=text)
        else:
            left = self.seconds / max(self._here, 1) * (self._steps - self._done)
            self._console.print(
                f"{self._title}  step {self._done}/{self._steps}  {text}  {left:.0f} s left",
                highlight=False,
            )
