# SPDX-License-Identifier: Apache-2.0
"""What a data set of image files is: their paths, labels and groups; no pixel is in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastresnet.data.datasets.errors import DatasetError
from fastresnet.data.datasets.image_set import check_labels
from fastresnet.data.datasets.split import hold_out
from fastresnet.data.decode import Header, ImageError, read_header

_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class FileSet:
    """Image files and their labels, in one order.

    ``labels`` is int64 [N]. ``groups``, int64 [N] where there are any, is equal for images that
    must stay on one side of a split, such as both eyes of a patient.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        for name, values in (("labels", self.labels), ("groups", self.groups)):
            if values is None and name == "groups":
                continue
            if values.dtype != torch.int64 or values.shape != (len(self.paths),):
                raise DatasetError(
                    f"expected {name} as int64 [{len(self.paths)}], got {values.dtype} "
                    f"{list(values.shape)}"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The bytes of the image file at ``index``.

        Raises:
            ImageError: there is no such file, or it cannot be read; of kind "missing".
        """
        return read_file(self.paths[index])

    def subset(self, indices: Tensor) -> FileSet:
        """The files at ``indices`` (int64 [K]), in that order."""
        return FileSet(
            tuple(self.paths[index] for index in indices.tolist()),
            self.labels[indices],
            None if self.groups is None else self.groups[indices],
        )

    def split(self, share: float, *, seed: int) -> tuple[FileSet, FileSet]:
        """Holds out a share of the images, drawn by ``seed``: returns (the rest, the held out).

        Every label is held out in proportion, as far as groups, which stay whole, allow:
        :func:`fastresnet.data.datasets.split.hold_out`.
        """
        rest, held = hold_out(self.labels, share, seed=seed, groups=self.groups)
        return self.subset(rest), self.subset(held)


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: there is no such file, or it cannot be read; of kind "missing".
    """
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ImageError(f"expected a readable file, got: {reason}", kind="missing") from error


def read_file_header(path: Path) -> Header:
    """The header of an image file, from its beginning where that is enough.

    Raises:
        ImageError: there is no such file, or it is no image.
    """
    try:
        with path.open("rb") as file:
            return read_header(file.read(_HEAD_BYTES))
    except (OSError, ImageError):
        return read_header(read_file(path))


@dataclass(frozen=True)
class FileDataset:
    """The parts of a data set of files, with the names of its classes.

    ``test`` and ``validation`` are None where the data set has no such part. ``source`` says in
    words where the files are and which layout they were read as.
    """

    name: str
    train: FileSet
    test: FileSet | None
    classes: tuple[str, ...]
    source: str
    validation: FileSet | None = None

    def __post_init__(self) -> None:
        for part, file_set in self.parts.items():
            check_labels(file_set.labels, self.classes, source=self.source, part=part)

    @property
    def parts(self) -> dict[str, FileSet]:
        """The parts that there are, by name: "train", "validation", "test"."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}
