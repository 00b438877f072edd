# SPDX-License-Identifier: Apache-2.0
"""Every layout in one table, and opening a folder whose layout nobody names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastresnet.data.datasets import (
    cifar,
    digits,
    fashion_mnist,
    image_csv,
    image_folder,
    mnist,
    mnist_m,
    retinopathy,
)
from fastresnet.data.datasets.errors import DatasetError, DatasetNotFoundError
from fastresnet.data.datasets.file_set import FileDataset
from fastresnet.data.datasets.image_set import ImageDataset
from fastresnet.data.datasets.index import Index

Dataset = ImageDataset | FileDataset

UNFINISHED = ".unfinished"
"""A file of this name is in a folder that is still being written, and that no one is to open."""


@dataclass(frozen=True)
class Layout:
    """How one kind of data set lies in a folder.

    Args:
        name: as users write it.
        needs: what the folder must hold, in words.
        recognises: whether a folder looks like it, from a few names and without reading much.
        index: lists the files and their problems; None where the set is not one of files.
        read: reads the set whole into memory; None where it stays in its files.
    """

    name: str
    needs: str
    recognises: Callable[[Path], bool]
    index: Callable[[Path], Index] | None = None
    read: Callable[[Path], ImageDataset] | None = None


_FOLDERS = Layout(
    "image-folder",
    "train/, valid/ and test/ with one folder a class, or the folders of classes themselves",
    image_folder.recognises,
    index=image_folder.index_image_folder,
)
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "retinopathy",
            "trainLabels.csv, or train_img.csv and train_label.csv, and the images",
            retinopathy.recognises,
            index=retinopathy.index_retinopathy,
        ),
        Layout(
            "image-csv",
            "a CSV file with the columns filepaths, labels and data set, and the images",
            image_csv.recognises,
            index=image_csv.index_image_csv,
        ),
        Layout(
            "mnist-m",
            "mnist_m_train/ and mnist_m_train_labels.txt, and the same for test",
            mnist_m.recognises,
            index=mnist_m.index_mnist_m,
            read=mnist_m.load_mnist_m,
        ),
        Layout(
            "cifar10",
            "cifar-10-batches-py/, cifar-10-batches-bin/, or the archive of either",
            cifar.recognises_cifar10,
            read=cifar.read_cifar10,
        ),
        Layout(
            "cifar100",
            "cifar-100-python/, cifar-100-binary/, or the archive of either",
            cifar.recognises_cifar100,
            read=cifar.read_cifar100,
        ),
        Layout(
            "mnist",
            "train-images-idx3-ubyte(.gz) and its three companions, or MNIST/raw/ with them",
            mnist.recognises,
            read=mnist.read_mnist,
        ),
        Layout(
            "fashion-mnist",
            "train-images-idx3-ubyte(.gz) and its three companions, or FashionMNIST/raw/ with them",
            fashion_mnist.recognises,
            read=fashion_mnist.read_fashion_mnist,
        ),
        _FOLDERS,
    )
}

PUBLISHED: dict[str, Callable[[Path | None], ImageDataset]] = {
    "digits": lambda root: digits.load_digits(),
    "mnist": mnist.load_mnist,
    "fashion-mnist": fashion_mnist.load_fashion_mnist,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
}


def find_layout(path: Path, name: str | None = None) -> Layout:
    """The layout of a folder (or of an archive): the one named, or the one it is recognised as.

    A folder of class folders that also has another layout's files of labels is taken as the
    latter.

    Raises:
        DatasetNotFoundError: there is nothing at ``path``.
        DatasetError: no layout has that name; or none, or more than one, is recognised; or the
            folder is still being written.
    """
    if not path.exists():
        raise DatasetNotFoundError(f"expected a folder with a data set, got none at {path}")
    if (path / UNFINISHED).exists():
        raise DatasetError(
            f"{path}: expected a whole data set, got one whose writing was interrupted: run the "
            "command that wrote it again"
        )
    if name is not None:
        if name not in LAYOUTS:
            raise DatasetError(f"expected a layout of {', '.join(LAYOUTS)}, got {name!r}")
        return LAYOUTS[name]
    matches = [
        layout
        for layout in LAYOUTS.values()
        if (path.is_dir() or layout.index is None) and layout.recognises(path)
    ]
    if len(matches) > 1 and _FOLDERS in matches:
        matches.remove(_FOLDERS)
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = " and ".join(layout.name for layout in matches)
        raise DatasetError(f"{path}: expected one layout, got {names}: name the one meant")
    known = "".join(f"\n  {layout.name}: {layout.needs}" for layout in LAYOUTS.values())
    raise DatasetError(f"{path}: expected one of these layouts, got none:{known}")


def open_dataset(
    path: Path,
    layout: str | None = None,
    *,
    test_share: float = 0.2,
    seed: int = 0,
    allow_missing: bool = False,
) -> Dataset:
    """Opens the data set in a folder, in whichever layout it is.

    Args:
        path: the folder, or an archive of CIFAR.
        layout: one of ``LAYOUTS``, where it cannot be recognised or is to be another.
        test_share: for a set of files with a training part only, the share of it that becomes the
            test part; 0 for none.
        seed: the seed of that split.
        allow_missing: for a set of files, keep images whose file is missing; reading one raises
            an error.

    Returns:
        The data set; its ``name`` and ``source`` say which layout it was taken for.

    Raises:
        DatasetError: the layout is not recognised, or the data set is not as it should be; the
            error lists everything that is wrong with it.
    """
    found = find_layout(path, layout)
    if found.read is not None:
        return found.read(path)
    return found.index(path).dataset(test_share=test_share, seed=seed, allow_missing=allow_missing)


def load_dataset(name_or_folder: str | Path, root: Path | None = None) -> Dataset:
    """Loads a published data set by its name, or opens a folder.

    Args:
        name_or_folder: digits, mnist, fashion-mnist, cifar10 or cifar100; anything else, and any
            ``Path``, is a folder for :func:`open_dataset`.
        root: where the files of a named set are, or are downloaded to.

    Raises:
        DatasetError: as the loaders say.
    """
    if isinstance(name_or_folder, str) and name_or_folder in PUBLISHED:
        return PUBLISHED[name_or_folder](root)
    path = Path(name_or_folder)
    if not path.exists():
        raise DatasetNotFoundError(
            f"expected one of {', '.join(PUBLISHED)}, or a folder, got {str(name_or_folder)!r}"
        )
    return open_dataset(path)
