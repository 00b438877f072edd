# SPDX-License-Identifier: Apache-2.0
"""What a run notes as it goes: ``metrics.jsonl``, ``metrics.csv``, and TensorBoard's events."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastresnet.train.checkpoint import CheckpointError, write_atomically


class Journal:
    """The notes of one run. ``metrics.jsonl`` gets an object a line as things happen.

    Args:
        folder: an existing folder for the files.
        tensorboard: also write events for TensorBoard, into ``tensorboard``.
        console: is told where that package is missing.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, console: Console) -> None:
        self._path = folder / "metrics.jsonl"
        self._table = folder / "metrics.csv"
        self._events_folder = folder / "tensorboard"
        self._events = None
        self._wants_events = tensorboard
        self._console = console
        self._first_step = 0

    def write(self, event: str, **values: Any) -> None:
        """Appends ``{"event": event, ...}``."""
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def plot(self, step: int, **values: float | None) -> None:
        """Gives TensorBoard the values at an optimiser's step; their names have ``_`` for ``/``."""
        if self._wants_events and self._events is None:
            self._open_events()
        if self._events is not None:
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(name.replace("_", "/", 1), value, step)
            self._events.flush()

    def write_table(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes ``metrics.csv``: a line a row, whole or absent."""

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self._table, write)

    def mark(self) -> int:
        """Lets what was written survive a crash; returns the length of the file, for
        :meth:`go_back`."""
        with self._path.open("a") as file:
            os.fsync(file.fileno())
            return file.tell()

    def go_back(self, mark: int, *, step: int) -> None:
        """Forgets what was written after a :meth:`mark`, and TensorBoard's events from ``step`` on.

        Raises:
            CheckpointError: the file is shorter than it was.
        """
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < mark:
            raise CheckpointError(
                f"{self._path}: expected the {mark} bytes of the run to be resumed, got {size}"
            )
        if size > mark:
            os.truncate(self._path, mark)
        self._first_step = step

    def close(self) -> None:
        """Ends TensorBoard's file."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _open_events(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._wants_events = False
            self._console.print(
                "no events for TensorBoard are written: expected the package tensorboard, got "
                "none (pip install tensorboard, or --set tensorboard=false)",
                highlight=False,
            )
            return
        self._events = SummaryWriter(str(self._events_folder), purge_step=self._first_step)
