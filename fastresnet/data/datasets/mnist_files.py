# SPDX-License-Identifier: Apache-2.0
"""The four IDX files in which MNIST and its relatives are published, and where to look for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastresnet.data.datasets.download import cache_folder
from fastresnet.data.datasets.errors import DatasetError, DatasetNotFoundError, read_all
from fastresnet.data.datasets.idx import read_idx
from fastresnet.data.datasets.image_set import ImageDataset, ImageSet

_SIZE = 28


@dataclass(frozen=True)
class MnistFiles:
    """A data set in MNIST's format.

    Args:
        title: its name in messages.
        name: its name as users write it.
        folder: the folder that torchvision gives it.
        classes: the names of its classes.
    """

    title: str
    name: str
    folder: str
    classes: tuple[str, ...]

    def load(
        self,
        root: Path | None,
        *,
        packaged: Sequence[Path] = (),
        download: Callable[[Path], None] | None,
        hint: str = "",
    ) -> ImageDataset:
        """Reads the files from the first folder that has them.

        The places, in order: ``root`` (the files, or torchvision's layout), ``packaged``, the
        cache of an earlier download, ``download`` (into ``root``, else into the cache; None: not
        allowed).

        Raises:
            DatasetNotFoundError: no place has the files; the message lists the places.
            DatasetError: a place has them, but a file is missing or damaged.
        """
        # The cache is shared by data sets whose files have the same names: only the folder of this
        # one will do there.
        folders = [] if root is None else [root, root / "raw", self._own_folder(root)]
        folders += [*packaged, self._own_folder(cache_folder())]
        for folder in folders:
            if _has_files(folder):
                return self._read_folder(folder)

        reason = "download switched off"
        if download is not None:
            target = cache_folder() if root is None else root
            try:
                download(target)
            except (OSError, RuntimeError) as error:
                reason = f"download failed: {error}"
            else:
                return self._read_folder(self._own_folder(target))
        looked_in = ", ".join(str(folder) for folder in dict.fromkeys(folders))
        raise DatasetNotFoundError(
            f"expected {self.title}'s IDX files, got none in {looked_in}; {reason}{hint}"
        )

    def read(self, root: Path) -> ImageDataset:
        """Reads the files from ``root`` or torchvision's folder in it, and from nowhere else.

        Raises:
            DatasetError: a file is missing or damaged.
        """
        folders = (root, root / "raw", self._own_folder(root))
        return self._read_folder(next(filter(_has_files, folders), root))

    def recognises(self, root: Path, is_own: Callable[[str], bool]) -> bool:
        """Whether ``root`` has the files in torchvision's folder for this data set, or has files
        of the format and its path's last two names, in lower case, satisfy ``is_own``."""
        if _has_files(self._own_folder(root)):
            return True
        words = "/".join(root.resolve().parts[-2:]).lower()
        return (_has_files(root) or _has_files(root / "raw")) and is_own(words)

    def _own_folder(self, root: Path) -> Path:
        return root / self.folder / "raw"

    def _read_folder(self, folder: Path) -> ImageDataset:
        train, test = read_all(
            str(folder), [partial(_read_part, folder, part) for part in ("train", "t10k")]
        )
        return ImageDataset(self.name, train, test, self.classes, source=str(folder))


def _has_files(folder: Path) -> bool:
    return _file(folder, "train", "images") is not None


def _file(folder: Path, part: str, kind: str) -> Path | None:
    dims = {"images": 3, "labels": 1}[kind]
    for suffix in ("", ".gz"):
        path = folder / f"{part}-{kind}-idx{dims}-ubyte{suffix}"
        if path.is_file():
            return path
    return None


def _read_part(folder: Path, part: str) -> ImageSet:
    paths = {kind: _file(folder, part, kind) for kind in ("images", "labels")}
    for kind, path in paths.items():
        if path is None:
            raise DatasetError.at(folder, f"expected a file of {part}'s {kind}, got none")
    images = read_idx(paths["images"], ndim=3)
    labels = read_idx(paths["labels"], ndim=1)
    if images.shape[1:] != (_SIZE, _SIZE):
        raise DatasetError.at(
            paths["images"],
            f"expected images of {_SIZE}x{_SIZE}, got {images.shape[1]}x{images.shape[2]}",
        )
    if len(images) != len(labels):
        raise DatasetError.at(
            paths["labels"],
            f"expected {len(images)} labels, one for each image, got {len(labels)}",
        )
    return ImageSet(
        torch.from_numpy(images).unsqueeze(3), torch.from_numpy(labels.astype(np.int64))
    )
