# SPDX-License-Identifier: Apache-2.0
"""What a layout lists before any image is opened: the files of each part, and what is wrong.

A layout of files is read in two steps. Its own module makes an :class:`Index` of the folder and
notes every problem in it; :meth:`Index.dataset` turns that into a data set, or raises one error
with all of them. ``fastresnet dataset check`` starts from the same index.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastresnet.data.datasets.errors import DatasetError, Problem
from fastresnet.data.datasets.file_set import FileDataset, FileSet
from fastresnet.data.datasets.table import Row, read_csv

# Those that torchvision's ImageFolder takes, but for those that Pillow alone writes.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class Entry:
    """An image with its label.

    ``group`` names the images that must stay together, ``rows`` the lines (file, line number
    from 1) that list the image, where files of labels do.
    """

    path: Path
    label: int
    group: str | None = None
    rows: tuple[tuple[Path, int], ...] = ()


@dataclass
class Index:
    """The entries of each part of a data set, by part: "train", "validation", "test".

    ``images`` are all image files of the folder, ``orphans`` those that nothing labels,
    ``label_files`` the files of labels. ``problems`` are in the order in which they were found.
    """

    layout: str
    folder: Path
    classes: tuple[str, ...] = ()
    parts: dict[str, list[Entry]] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    label_files: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def error(self, kind: str, path: Path, message: str, *, row: int | None = None) -> None:
        """Notes what makes the data set unfit for training as it is."""
        self.problems.append(Problem(kind, path, row, message))

    def note(self, kind: str, path: Path, message: str, *, row: int | None = None) -> None:
        """Notes what is worth knowing and does no harm."""
        self.problems.append(Problem(kind, path, row, message, error=False))

    def read_rows(self, path: Path) -> list[Row]:
        """The rows of a CSV file of labels; notes an error and returns none if it has none."""
        self.label_files.append(path)
        try:
            rows = read_csv(path)
        except DatasetError as error:
            self.problems += error.problems
            return []
        if not rows:
            self.error("header", path, "expected rows, got an empty file")
        return rows

    def find_orphans(self, listed: Iterable[Path]) -> None:
        """Fills ``orphans`` with the images that are not among those ``listed``, and notes them."""
        known = set(listed)
        self.orphans = [path for path in self.images if path not in known]
        for path in self.orphans:
            self.note("orphan", path, "expected a label for this image, got none")

    def dataset(
        self, *, test_share: float = 0.2, seed: int = 0, allow_missing: bool = False
    ) -> FileDataset:
        """The data set.

        Args:
            test_share: where there is nothing but a training part, the share of it that becomes
                the test part; 0 for no test part.
            seed: the seed of that split.
            allow_missing: keep images whose file is missing; reading one raises an error.

        Raises:
            DatasetError: anything is wrong; the error lists everything that is.
        """
        errors = [
            problem
            for problem in self.problems
            if problem.error and not (allow_missing and problem.kind == "missing")
        ]
        source = f"{self.folder} ({self.layout} layout)"
        if errors:
            raise DatasetError.listing(source, errors)
        if not self.parts.get("train"):
            raise DatasetError(f"{source}: the training part holds no image")
        numbers: dict[str, int] = {}
        sets = {part: _file_set(entries, numbers) for part, entries in self.parts.items()}
        if sets.keys() == {"train"} and test_share:
            sets["train"], sets["test"] = sets["train"].split(test_share, seed=seed)
        return FileDataset(
            name=self.layout,
            train=sets["train"],
            test=sets.get("test"),
            classes=self.classes,
            source=source,
            validation=sets.get("validation"),
        )


def _file_set(entries: list[Entry], numbers: dict[str, int]) -> FileSet:
    groups = None
    if entries and all(entry.group is not None for entry in entries):
        groups = torch.tensor([numbers.setdefault(entry.group, len(numbers)) for entry in entries])
    return FileSet(
        tuple(entry.path for entry in entries),
        torch.tensor([entry.label for entry in entries], dtype=torch.int64),
        groups,
    )


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files under ``folder``, sorted folder by folder: (images by their suffix, others).

    Links are followed, but no folder is entered twice; hidden files and folders are passed over.
    """
    images, others = [], []
    entered = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                kind = images if name.lower().endswith(IMAGE_SUFFIXES) else others
                kind.append(Path(parent, name))
    return images, others
