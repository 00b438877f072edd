# SPDX-License-Identifier: Apache-2.0
"""MNIST (LeCun, Bottou, Bengio, Haffner 1998): 60,000 + 10,000 grey 28x28 handwritten digits."""

from __future__ import annotations

from pathlib import Path

from fastresnet.data.datasets.download import torchvision_download
from fastresnet.data.datasets.image_set import ImageDataset
from fastresnet.data.datasets.mnist_files import MnistFiles

CLASSES = tuple(str(digit) for digit in range(10))

_FILES = MnistFiles("MNIST", "mnist", "MNIST", CLASSES)


def load_mnist(root: Path | None = None, *, download: bool = True) -> ImageDataset:
    """Loads MNIST from the first place that has it.

    The places, in order: ``root`` (the four IDX files, or torchvision's layout), the cache of an
    earlier download, torchvision's downloader (into ``root``, else into the cache).

    Raises:
        DatasetNotFoundError: no place has the files; the message lists the places.
        DatasetError: a place has them, but a file is missing or damaged.
    """
    return _FILES.load(root, download=_download if download else None)


def recognises(folder: Path) -> bool:
    """Whether ``folder`` has the files, and is not named after Fashion-MNIST."""
    return _FILES.recognises(folder, lambda words: "fashion" not in words)


def read_mnist(folder: Path) -> ImageDataset:
    """Reads the four IDX files in ``folder``, and from nowhere else.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    return _FILES.read(folder)


def _download(root: Path) -> None:
    torchvision_download("MNIST", root)
