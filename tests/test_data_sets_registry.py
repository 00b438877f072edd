# SPDX-License-Identifier: Apache-2.0
"""Opening folders whose layout nobody names, and data sets by their name."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastresnet.data import (
    LAYOUTS,
    DatasetError,
    DatasetNotFoundError,
    FileDataset,
    ImageDataset,
    ImageSet,
    load_dataset,
    open_dataset,
    write_cifar10,
    write_mnist_m,
    write_retinopathy,
)
from fastresnet.data.datasets.registry import UNFINISHED, find_layout

IMAGES = torch.randint(0, 256, (12, 32, 32, 3), generator=torch.Generator().manual_seed(0))
SMALL = ImageSet(IMAGES.to(torch.uint8), torch.arange(12) % 5)
DATASET = ImageDataset("small", SMALL, SMALL, tuple("abcdefghij"), "here")


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_idx(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, shape in (("images-idx3", (10, 28, 28)), ("labels-idx1", (10,))):
            header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
            content = gzip.compress(header + bytes(int(np.prod(shape))))
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(content)


def write_image_csv(folder: Path) -> None:
    write_images(folder, "train/a/0.jpg", "test/a/0.jpg")
    (folder / "a.csv").write_text(
        "filepaths,labels,data set\ntrain/a/0.jpg,a,train\ntest/a/0.jpg,a,test\n"
    )


def write_kaggle(folder: Path) -> None:
    write_retinopathy(SMALL.images.numpy(), SMALL.labels, None, folder)


def write_cifar100(folder: Path) -> None:
    (folder / "cifar-100-binary").mkdir(parents=True)
    record = bytes(2 + 3072)
    for name in ("train.bin", "test.bin"):
        (folder / "cifar-100-binary" / name).write_bytes(record * 3)
    (folder / "cifar-100-binary" / "fine_label_names.txt").write_text("apple\n")


WRITERS: list[tuple[str, Callable[[Path], object]]] = [
    ("retinopathy", write_kaggle),
    ("image-csv", write_image_csv),
    ("image-folder", lambda folder: write_images(folder, "train/a/0.jpg", "test/a/0.jpg")),
    (
        "image-folder",
        lambda folder: write_images(folder, *(f"{c}/{i}.png" for c in "ab" for i in range(5))),
    ),
    ("mnist-m", lambda folder: write_mnist_m(DATASET, folder)),
    ("mnist-m", lambda folder: write_mnist_m(DATASET, folder / "mnist_m")),
    ("cifar10", lambda folder: write_cifar10(DATASET, folder)),
    ("cifar10", lambda folder: write_cifar10(DATASET, folder, form="binary")),
    ("cifar100", write_cifar100),
    ("mnist", lambda folder: write_idx(folder / "MNIST" / "raw")),
    ("fashion-mnist", lambda folder: write_idx(folder / "FashionMNIST" / "raw")),
]


@pytest.mark.parametrize(("layout", "write"), WRITERS)
def test_every_layout_is_recognised_as_itself_alone(
    layout: str, write: Callable[[Path], object], tmp_path: Path
) -> None:
    write(tmp_path / "data")
    assert find_layout(tmp_path / "data").name == layout
    dataset = open_dataset(tmp_path / "data")
    assert dataset.name == layout
    files = LAYOUTS[layout].read is None
    assert isinstance(dataset, FileDataset if files else ImageDataset)
    assert str(tmp_path / "data") in dataset.source
    assert (layout in dataset.source) or not files
    assert load_dataset(str(tmp_path / "data")).name == layout


def test_every_layout_is_tried_above() -> None:
    assert {layout for layout, _ in WRITERS} == set(LAYOUTS)


def test_the_name_of_the_folder_tells_mnist_from_fashion_mnist(tmp_path: Path) -> None:
    for folder, layout in (
        ("mnist", "mnist"),
        ("fashion-mnist", "fashion-mnist"),
        ("FashionMNIST/raw", "fashion-mnist"),
        ("MNIST/raw", "mnist"),
    ):
        write_idx(tmp_path / folder)
        assert open_dataset(tmp_path / folder).name == layout
    write_idx(tmp_path / "unnamed" / "digits")
    with pytest.raises(DatasetError, match="expected one layout, got mnist and fashion-mnist"):
        open_dataset(tmp_path / "unnamed" / "digits")
    assert open_dataset(tmp_path / "unnamed" / "digits", "mnist").name == "mnist"


def test_two_data_sets_in_one_folder_are_too_many(tmp_path: Path) -> None:
    write_cifar10(DATASET, tmp_path)
    write_cifar100(tmp_path)
    with pytest.raises(DatasetError, match="expected one layout, got cifar10 and cifar100: name"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, "cifar100").classes == ("apple",)


def test_a_folder_that_is_none_of_them_is_told_what_each_needs(tmp_path: Path) -> None:
    write_images(tmp_path, "images/0.jpg", "notes.csv")
    with pytest.raises(DatasetError, match="expected one of these layouts, got none") as error:
        open_dataset(tmp_path)
    for name, layout in LAYOUTS.items():
        assert f"\n  {name}: {layout.needs}" in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="expected one of these layouts, got none"):
        open_dataset(tmp_path / "file")


def test_a_named_layout_reads_from_the_folder_and_nowhere_else(tmp_path: Path) -> None:
    # Neither a package of the system nor the cache of a download stands in.
    for name in LAYOUTS:
        if name != "image-folder":
            with pytest.raises(DatasetError, match=str(tmp_path)):
                open_dataset(tmp_path, name)
    with pytest.raises(DatasetError, match=r"expected a layout of retinopathy, .* got 'imagenet'"):
        open_dataset(tmp_path, "imagenet")


def test_folders_that_are_not_there_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="expected a folder with a data set, got none"):
        open_dataset(tmp_path / "none")
    write_kaggle(tmp_path)
    (tmp_path / UNFINISHED).touch()
    with pytest.raises(DatasetError, match="got one whose writing was interrupted"):
        open_dataset(tmp_path)


def test_data_sets_by_name(tmp_path: Path) -> None:
    assert load_dataset("digits").name == "digits"
    write_idx(tmp_path / "raw")
    assert load_dataset("mnist", tmp_path).name == "mnist"
    write_cifar10(DATASET, tmp_path)
    assert load_dataset("cifar10", tmp_path).name == "cifar10"
    with pytest.raises(
        DatasetNotFoundError, match=r"expected one of digits, .* or a folder, got 'x'"
    ):
        load_dataset("x")


def test_options_reach_the_split(tmp_path: Path) -> None:
    write_kaggle(tmp_path)
    first, other = (open_dataset(tmp_path, test_share=0.5, seed=seed) for seed in (0, 1))
    assert len(first.train) == len(first.test) == 6
    assert first.test.paths != other.test.paths
    first.train.paths[0].unlink()
    with pytest.raises(DatasetError, match="got no such file"):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, test_share=0, allow_missing=True).train) == 12
