# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 grey 28x28 pictures of clothes."""

from __future__ import annotations

from pathlib import Path

from fastresnet.data.datasets.download import torchvision_download
from fastresnet.data.datasets.image_set import ImageDataset
from fastresnet.data.datasets.mnist_files import MnistFiles

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_FILES = MnistFiles("Fashion-MNIST", "fashion-mnist", "FashionMNIST", CLASSES)


def load_fashion_mnist(root: Path | None = None, *, download: bool = True) -> ImageDataset:
    """Loads Fashion-MNIST from the first place that has it.

    The places, in order: ``root`` (the four IDX files, or torchvision's layout), Debian's package
    ``dataset-fashion-mnist``, the cache of an earlier download, torchvision's downloader (into
    ``root``, else into the cache).

    Raises:
        DatasetNotFoundError: no place has the files; the message lists the places.
        DatasetError: a place has them, but a file is missing or damaged.
    """
    return _FILES.load(
        root,
        packaged=[DEBIAN_FOLDER],
        download=_download if download else None,
        hint=" (on Debian or Ubuntu: apt-get install dataset-fashion-mnist)",
    )


def recognises(folder: Path) -> bool:
    """Whether ``folder`` has the files, and is not named after plain MNIST."""
    return _FILES.recognises(folder, lambda words: "fashion" in words or "mnist" not in words)


def read_fashion_mnist(folder: Path) -> ImageDataset:
    """Reads the four IDX files in ``folder``, and from nowhere else.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    return _FILES.read(folder)


def _download(root: Path) -> None:
    torchvision_download("FashionMNIST", root)
