# SPDX-License-Identifier: Apache-2.0
"""Checks a data set before hours are spent on it: every label, every file, every header.

A problem is an error where training would stop or learn something false, and a note where it is
merely worth knowing, because the file is read as it should be all the same.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastresnet.data.datasets.errors import DatasetError, Problem
from fastresnet.data.datasets.file_set import read_file, read_file_header
from fastresnet.data.datasets.index import Entry, Index
from fastresnet.data.datasets.registry import find_layout
from fastresnet.data.decode import Header, ImageError, verify
from fastresnet.data.parallel import Progress, map_in_order, report

_ENDS = {"jpeg": b"\xff\xd9", "png": b"IEND\xaeB`\x82"}
_FORMATS = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".png": "png",
    ".bmp": "bmp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".webp": "webp",
    ".ppm": "pnm",
    ".pgm": "pnm",
}


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Args:
        layout: the layout that the folder was read in.
        images: labelled images, by part.
        files: image files that were looked at.
        problems: all of them, errors and notes, in the order of the labels and the files.
        seconds: that the check took.
    """

    folder: Path
    layout: str
    images: dict[str, int]
    files: int
    problems: tuple[Problem, ...]
    seconds: float

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that stop or spoil training."""
        return tuple(problem for problem in self.problems if problem.error)

    @property
    def notes(self) -> tuple[Problem, ...]:
        """The other problems."""
        return tuple(problem for problem in self.problems if not problem.error)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "folder": str(self.folder),
            "layout": self.layout,
            "images": self.images,
            "files": self.files,
            "errors": len(self.errors),
            "notes": len(self.notes),
            "seconds": round(self.seconds, 3),
            "problems": [
                {
                    "kind": problem.kind,
                    "error": problem.error,
                    "path": str(problem.path),
                    "row": problem.row,
                    "message": problem.message,
                }
                for problem in self.problems
            ],
        }


def check_dataset(
    folder: Path,
    layout: str | None = None,
    *,
    full: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Checks the data set in a folder, and finds all of its problems rather than the first.

    Every label is checked, and of every image file that it is there, that its header is that of an
    image, and that it has an end; a file without is decoded, as ``full`` does with all of them.

    Args:
        layout: one of ``LAYOUTS``; None: as it is recognised.
        full: decode every file, which finds what is damaged in the middle, and tell which files
            are equal byte by byte.
        threads: that read files; None: one a processor.
        progress: is told how many of how many files are done.

    Raises:
        DatasetError: the layout is not known or not recognised. Whatever is wrong with a data set
            of that layout is in the report.
    """
    begin = time.perf_counter()
    found = find_layout(folder, layout)
    problems: list[Problem] = []
    images: dict[str, int] = {}
    files = 0
    if found.index is not None:
        index = found.index(folder)
        problems += index.problems
        images = {part: len(entries) for part, entries in index.parts.items()}
        files = len(index.images)
        problems += _check_files(index, full=full, threads=threads, progress=progress)
        if not images.get("train") and not _has_errors(problems):
            message = "expected a training part with images, got none"
            problems.append(Problem("label", folder, None, message))
    if found.read is not None and (found.index is None or (full and not _has_errors(problems))):
        try:
            dataset = found.read(folder)
        except DatasetError as error:
            problems += error.problems or (Problem("damaged", folder, None, str(error)),)
        else:
            images = {part: len(image_set) for part, image_set in dataset.parts.items()}
            if found.index is None:
                problems += _empty_classes(folder, dataset.classes, dataset.train.labels.tolist())
    seconds = time.perf_counter() - begin
    return CheckReport(folder, found.name, images, files, tuple(problems), seconds)


def _has_errors(problems: list[Problem]) -> bool:
    return any(problem.error for problem in problems)


@dataclass(frozen=True)
class _Look:
    """What one file is: its fault, or its header and, where all was read, its digest."""

    fault: ImageError | None
    header: Header | None = None
    digest: bytes | None = None


def _check_files(
    index: Index, *, full: bool, threads: int | None, progress: Progress | None
) -> Iterator[Problem]:
    listed = {
        entry.path: (part, entry) for part, entries in index.parts.items() for entry in entries
    }
    orphans = set(index.orphans)
    first: dict[bytes, Path] = {}
    looks = map_in_order(lambda path: _look(path, full=full), index.images, threads=threads)
    looks = report(looks, len(index.images), progress)
    for path, look in zip(index.images, looks, strict=True):
        part, entry = listed.get(path, (None, None))
        if look.fault is not None:
            # What nothing labels is not trained on.
            message = f"{look.fault}{_rows(entry)}"
            yield Problem(look.fault.kind, path, None, message, error=path not in orphans)
            continue
        for oddity in _oddities(path, look.header):
            yield Problem("odd", path, None, oddity, error=False)
        if look.digest is not None and entry is not None:
            twin = first.setdefault(look.digest, path)
            if twin != path:
                other, twin_entry = listed[twin]
                kind = "duplicate" if part == other else "leak"
                message = (
                    f"expected an image of its own, got the bytes of {twin}; labels {entry.label} "
                    f"({part}) and {twin_entry.label} ({other})"
                )
                yield Problem(kind, path, None, message, error=False)
    if not _has_errors(index.problems):
        labels = [entry.label for entry in index.parts.get("train", [])]
        yield from _empty_classes(index.folder, index.classes, labels)


def _look(path: Path, *, full: bool) -> _Look:
    try:
        header = read_file_header(path)
        if not full and _has_end(path, header):
            return _Look(None, header)
        data = read_file(path)
        digest = hashlib.blake2b(data, digest_size=16).digest() if full else None
        return _Look(None, verify(data), digest)
    except ImageError as error:
        return _Look(error)


def _has_end(path: Path, header: Header) -> bool:
    """Whether the last bytes are those that end a file of its format; not so if it was cut off."""
    end = _ENDS.get(header.format)
    if end is None:
        return False
    with path.open("rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end


def _oddities(path: Path, header: Header) -> Iterator[str]:
    if header.mode not in ("L", "RGB"):
        yield f"expected RGB or grey of 8 bits, got {header.mode}: it is converted"
    if header.orientation != 1:
        yield f"expected an upright image, got EXIF orientation {header.orientation}: it is turned"
    wanted = _FORMATS[path.suffix.lower()]
    if header.format != wanted:
        yield f"expected {wanted} by its name, got {header.format}: it is read as that"


def _rows(entry: Entry | None) -> str:
    if entry is None or not entry.rows:
        return ""
    return f" (listed in {' and '.join(f'{path.name}:{row}' for path, row in entry.rows)})"


def _empty_classes(folder: Path, classes: tuple[str, ...], labels: list[int]) -> Iterator[Problem]:
    present = set(labels)
    for label, name in enumerate(classes):
        if label not in present:
            message = f"expected training images of class {name}, got none"
            yield Problem("label", folder, None, message, error=False)
