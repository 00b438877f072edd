# SPDX-License-Identifier: Apache-2.0
"""Finding and checking data sets. Nothing here downloads."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastresnet.data import (
    DatasetError,
    DatasetNotFoundError,
    ImageDataset,
    ImageSet,
    load_digits,
    load_fashion_mnist,
    load_mnist,
)
from fastresnet.data.datasets import fashion_mnist


def idx_bytes(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_fashion_mnist(folder: Path, *, compress: bool) -> None:
    """Writes 20 + 10 random images in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 10)):
        files = {
            "images-idx3-ubyte": generator.integers(0, 256, (count, 28, 28)),
            "labels-idx1-ubyte": np.arange(count) % 10,
        }
        for name, values in files.items():
            content = idx_bytes(values)
            if compress:
                (folder / f"{part}-{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{part}-{name}").write_bytes(content)


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def no_network(root: Path) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(fashion_mnist, "_download", no_network)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("folder", ["", "raw", "FashionMNIST/raw"])
def test_finds_the_files_under_data(tmp_path: Path, folder: str, compress: bool) -> None:
    write_fashion_mnist(tmp_path / "data" / folder, compress=compress)
    dataset = load_fashion_mnist(tmp_path / "data")
    assert dataset.source == str(tmp_path / "data" / folder)
    assert dataset.train.images.shape == (20, 28, 28, 1)
    assert dataset.test.labels.tolist() == list(range(10))
    assert dataset.channels == 1


def test_order_of_the_places(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "fastresnet" / "FashionMNIST" / "raw"
    places = [cache, tmp_path / "debian", tmp_path / "data"]
    for place in places:
        write_fashion_mnist(place, compress=True)
        assert load_fashion_mnist(tmp_path / "data").source == str(place)


def test_downloads_where_no_place_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: Path) -> None:
        write_fashion_mnist(root / "FashionMNIST" / "raw", compress=False)

    monkeypatch.setattr(fashion_mnist, "_download", download)
    assert load_fashion_mnist().source.startswith(str(tmp_path / "cache"))
    assert load_fashion_mnist(tmp_path / "data").source.startswith(str(tmp_path / "cache"))


@pytest.mark.parametrize(("download", "reason"), [(True, "no network"), (False, "switched off")])
def test_says_where_it_looked_and_why_it_failed(
    tmp_path: Path, download: bool, reason: str
) -> None:
    with pytest.raises(DatasetNotFoundError, match=reason) as error:
        load_fashion_mnist(tmp_path / "data", download=download)
    for place in ("data", "debian", "cache"):
        assert str(tmp_path / place) in str(error.value)


def test_a_damaged_copy_is_an_error_and_not_passed_over(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data", compress=False)
    write_fashion_mnist(tmp_path / "debian", compress=True)
    labels = tmp_path / "data" / "t10k-labels-idx1-ubyte"

    labels.write_bytes(idx_bytes(np.arange(9)))
    with pytest.raises(DatasetError, match="expected 10 labels, one for each image, got 9"):
        load_fashion_mnist(tmp_path / "data")

    labels.write_bytes(idx_bytes(np.arange(10) + 1))
    with pytest.raises(DatasetError, match=r"expected test labels in 0\.\.9, got 1\.\.10"):
        load_fashion_mnist(tmp_path / "data")

    labels.unlink()
    with pytest.raises(DatasetError, match="expected a file of t10k's labels, got none"):
        load_fashion_mnist(tmp_path / "data")

    # Both parts are looked at before the error.
    images = tmp_path / "data" / "train-images-idx3-ubyte"
    images.write_bytes(idx_bytes(np.zeros((20, 27, 28))))
    with pytest.raises(DatasetError, match="expected images of 28x28, got 27x28") as error:
        load_fashion_mnist(tmp_path / "data")
    assert [problem.path for problem in error.value.problems] == [images, tmp_path / "data"]


def test_digits_are_real_and_split_the_same_every_time() -> None:
    first, second = load_digits(), load_digits()
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.train.images.shape[1:] == (28, 28, 1)
    assert torch.equal(first.test.images, second.test.images)
    assert torch.bincount(first.train.labels).min() > 100
    # A network would be wasted on digits that a nearest mean cannot tell apart at all.
    means = torch.stack(
        [first.train.images[first.train.labels == digit].float().mean(0) for digit in range(10)]
    )
    distances = torch.cdist(first.test.images.flatten(1).float(), means.flatten(1))
    assert (distances.argmin(1) == first.test.labels).float().mean() > 0.8


def test_mnist_is_read_from_its_own_folder_of_the_cache_only(tmp_path: Path) -> None:
    # The files of both data sets have the same names.
    write_fashion_mnist(tmp_path / "cache" / "fastresnet" / "raw", compress=True)
    with pytest.raises(DatasetNotFoundError, match="expected MNIST's IDX files"):
        load_mnist(download=False)
    write_fashion_mnist(tmp_path / "cache" / "fastresnet" / "MNIST" / "raw", compress=True)
    dataset = load_mnist(download=False)
    assert (dataset.name, dataset.classes[7], len(dataset.train)) == ("mnist", "7", 20)


def image_set(count: int) -> ImageSet:
    return ImageSet(torch.zeros(count, 2, 2, 1, dtype=torch.uint8), torch.arange(count))


def test_split_is_a_partition_fixed_by_the_seed() -> None:
    rest, held_out = image_set(60).split(1 / 12, seed=0)
    assert (len(rest), len(held_out)) == (55, 5)
    assert sorted(rest.labels.tolist() + held_out.labels.tolist()) == list(range(60))
    assert torch.equal(held_out.labels, image_set(60).split(1 / 12, seed=0)[1].labels)
    assert not torch.equal(held_out.labels, image_set(60).split(1 / 12, seed=1)[1].labels)
    with pytest.raises(DatasetError, match="expected a share that leaves images on both sides"):
        image_set(5).split(0.01, seed=0)


def test_image_sets_refuse_other_types_and_shapes() -> None:
    images, labels = torch.zeros(3, 2, 2, 1, dtype=torch.uint8), torch.arange(3)
    with pytest.raises(DatasetError, match=r"expected images as uint8 .* got torch.float32"):
        ImageSet(images.float(), labels)
    with pytest.raises(
        DatasetError, match=r"expected labels as int64 \[3\], got torch.int64 \[2\]"
    ):
        ImageSet(images, labels[:2])
    with pytest.raises(DatasetError, match="the test part holds no image"):
        ImageDataset("none", image_set(3), image_set(0), ("a", "b", "c"), "nowhere")


@pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed"
)
def test_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    dataset = load_fashion_mnist(download=False)
    assert torch.bincount(dataset.train.labels).tolist() == [6000] * 10
    assert torch.bincount(dataset.test.labels).tolist() == [1000] * 10
    assert dataset.train.images.float().mean().item() == pytest.approx(0.2860 * 255, abs=0.05)
