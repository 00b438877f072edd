# SPDX-License-Identifier: Apache-2.0
"""What becomes of files that cannot be used: one policy for every backend, and a count."""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path
from typing import Literal, get_args

from fastresnet.data.datasets.image_set import DatasetError
from fastresnet.data.decode import ImageError

OnError = Literal["raise", "skip", "placeholder"]

_log = logging.getLogger("fastresnet.data")


class TooManyFaultsError(DatasetError):
    """More files cannot be used than the loader was allowed to do without."""


class Faults:
    """The files of a set that could not be used so far.

    Each is named once in the log. Safe to report to from several threads.

    Args:
        on_error: ``"raise"`` stops at the first; with ``"skip"`` the loader shows another image in
            its place in training, and leaves it out of evaluation; with ``"placeholder"`` it shows
            a black one.
        count: files in the set.
        limit: the share of them that may be unusable (at least one file may).
    """

    def __init__(self, on_error: OnError, *, count: int, limit: float = 0.01) -> None:
        if on_error not in get_args(OnError):
            raise ValueError(
                f"expected on_error to be one of {', '.join(get_args(OnError))}, got {on_error!r}"
            )
        if not 0 <= limit <= 1:
            raise ValueError(f"expected a limit as a share in 0..1, got {limit}")
        self.on_error = on_error
        self.limit = max(math.ceil(limit * count), 1)
        self._count = count
        self._files: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many files could not be used."""
        return len(self._files)

    @property
    def files(self) -> dict[int, str]:
        """Index in the set and what is wrong, of each file that could not be used."""
        with self._lock:
            return dict(self._files)

    def report(self, index: int, path: Path, error: ImageError) -> None:
        """Counts a file.

        Raises:
            ImageError: ``on_error`` is ``"raise"``.
            TooManyFaultsError: there are more such files than ``limit``.
        """
        message = f"{path}: {error}"
        if self.on_error == "raise":
            raise ImageError(message, kind=error.kind) from error
        with self._lock:
            if index not in self._files:
                self._files[index] = message
                _log.warning("%s (%s)", message, self.on_error)
            if len(self._files) > self.limit:
                raise TooManyFaultsError(
                    f"expected at most {self.limit} of {self._count} files that cannot be used, "
                    f"got {len(self._files)}; the last is {message}"
                )
