# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a data set: one :class:`Problem` each, and the errors that list them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one file of a data set.

    Args:
        kind: in one or two words: "header", "label", "duplicate", "missing", "orphan", "leak",
            "ignored", "odd", "damaged", or a kind of :class:`fastresnet.data.decode.ImageError`.
        path: the file.
        row: the line of that file, counted from 1, where it is a file of labels.
        message: what was expected, and what came.
        error: False for what is merely worth knowing: training is right all the same.
    """

    kind: str
    path: Path
    row: int | None
    message: str
    error: bool = True

    def __str__(self) -> str:
        place = str(self.path) if self.row is None else f"{self.path}:{self.row}"
        return f"{place}: {self.message}"


class DatasetError(ValueError):
    """A data set's files are missing, damaged, or not what their layout promises.

    ``problems`` holds each of them where they were looked for one by one; the message shows the
    first 20 and says how many there are.
    """

    problems: tuple[Problem, ...] = ()

    @classmethod
    def at(cls, path: Path, message: str, *, kind: str = "damaged") -> DatasetError:
        """The error of one file."""
        return cls.listing(str(path), [Problem(kind, path, None, message)])

    @classmethod
    def listing(cls, where: str, problems: Sequence[Problem]) -> DatasetError:
        """The error that lists ``problems``, at least one, of a data set at ``where``."""
        count = len(problems)
        lines = [str(problem) for problem in problems[:_SHOWN]]
        if count > 1:
            lines.insert(0, f"{where}: {count} problems")
        if count > _SHOWN:
            lines.append(f"and {count - _SHOWN} more")
        error = cls("\n  ".join(lines))
        error.problems = tuple(problems)
        return error


class DatasetNotFoundError(DatasetError):
    """A data set is not on this machine and cannot be downloaded."""


def read_all(where: str, readers: Iterable[Callable[[], _T]]) -> list[_T]:
    """What every reader returns; where some raise, one error with what all of those found.

    Raises:
        DatasetError: a reader raised one.
    """
    results: list[_T] = []
    problems: list[Problem] = []
    for read in readers:
        try:
            results.append(read())
        except DatasetError as error:
            problems += error.problems
    if problems:
        raise DatasetError.listing(where, problems)
    return results
