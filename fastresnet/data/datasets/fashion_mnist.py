# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 grey 28x28 pictures of clothes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fastresnet.data.datasets.idx import read_idx
from fastresnet.data.datasets.image_set import (
    DatasetError,
    DatasetNotFoundError,
    ImageDataset,
    ImageSet,
)

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
_SIZE = 28
_CONNECT_SECONDS = 15.0


def load_fashion_mnist(root: Path | None = None, *, download: bool = True) -> ImageDataset:
    """Loads Fashion-MNIST from the first place that has it.

    The places, in order: ``root`` (the four IDX files, or torchvision's layout), Debian's package
    ``dataset-fashion-mnist``, the cache of an earlier download, torchvision's downloader (into
    ``root``, else into the cache).

    Raises:
        DatasetNotFoundError: no place has the files; the message lists the places.
        DatasetError: a place has them, but a file is missing or damaged.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastresnet"
    roots = [root, cache] if root is not None else [cache]
    folders = [
        folder for base in roots for folder in (base, base / "raw", base / "FashionMNIST" / "raw")
    ]
    folders.insert(3 if root is not None else 0, DEBIAN_FOLDER)
    for folder in folders:
        if _file(folder, "train", "images") is not None:
            return _read(folder)

    reason = "download switched off"
    if download:
        target = roots[0]
        try:
            _download(target)
        except (OSError, RuntimeError) as error:
            reason = f"download failed: {error}"
        else:
            return _read(target / "FashionMNIST" / "raw")
    looked_in = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise DatasetNotFoundError(
        f"expected Fashion-MNIST's IDX files, got none in {looked_in}; {reason} "
        "(on Debian or Ubuntu: apt-get install dataset-fashion-mnist)"
    )


def _file(folder: Path, part: str, kind: str) -> Path | None:
    dims = {"images": 3, "labels": 1}[kind]
    for suffix in ("", ".gz"):
        path = folder / f"{part}-{kind}-idx{dims}-ubyte{suffix}"
        if path.is_file():
            return path
    return None


def _read(folder: Path) -> ImageDataset:
    return ImageDataset(
        name="fashion-mnist",
        train=_read_part(folder, "train"),
        test=_read_part(folder, "t10k"),
        classes=CLASSES,
        source=str(folder),
    )


def _read_part(folder: Path, part: str) -> ImageSet:
    paths = {kind: _file(folder, part, kind) for kind in ("images", "labels")}
    for kind, path in paths.items():
        if path is None:
            raise DatasetError(f"{folder}: expected a file of {part}'s {kind}, got none")
    images = read_idx(paths["images"], ndim=3)
    labels = read_idx(paths["labels"], ndim=1)
    if images.shape[1:] != (_SIZE, _SIZE):
        raise DatasetError(
            f"{paths['images']}: expected images of {_SIZE}x{_SIZE}, "
            f"got {images.shape[1]}x{images.shape[2]}"
        )
    if len(images) != len(labels):
        raise DatasetError(
            f"{paths['labels']}: expected {len(images)} labels, one for each image, "
            f"got {len(labels)}"
        )
    return ImageSet(
        torch.from_numpy(images).unsqueeze(3), torch.from_numpy(labels.astype(np.int64))
    )


def _download(root: Path) -> None:
    from torchvision.datasets import FashionMNIST

    with _connect_timeout(_CONNECT_SECONDS):
        FashionMNIST(str(root), train=True, download=True)


@contextmanager
def _connect_timeout(seconds: float) -> Iterator[None]:
    # torchvision opens its URLs without a timeout: behind a firewall that drops packets, the
    # fallback would come only after minutes of silence.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
