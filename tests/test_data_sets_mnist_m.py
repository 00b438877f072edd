# SPDX-License-Identifier: Apache-2.0
"""MNIST-M: blending digits with photographs, and the published layout written and read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastresnet.data import (
    DatasetError,
    ImageDataset,
    ImageSet,
    build_mnist_m,
    load_digits,
    load_mnist_m,
    write_mnist_m,
)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    dataset = load_digits()
    return ImageDataset(
        "digits",
        dataset.train.subset(torch.arange(60)),
        dataset.test.subset(torch.arange(20)),
        dataset.classes,
        dataset.source,
    )


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def find_patch(patch: np.ndarray, photograph: np.ndarray) -> bool:
    """Whether the patch occurs in the photograph, told by its first row."""
    rows = np.lib.stride_tricks.sliding_window_view(photograph, (1, patch.shape[1], 3))
    rows = rows.reshape(*rows.shape[:2], patch.shape[1], 3)
    for y, x in np.argwhere((rows == patch[0]).all(axis=(2, 3))):
        if np.array_equal(photograph[y : y + len(patch), x : x + patch.shape[1]], patch):
            return True
    return False


@pytest.mark.parametrize("size", [28, 32])
def test_a_pixel_is_the_distance_of_digit_and_patch(
    digits: ImageDataset, photographs: list[np.ndarray], size: int
) -> None:
    few = digits.train.subset(torch.arange(6))
    # Where digits are black or white, the photograph itself or its negative can be looked for.
    few = ImageSet((few.images > 100).to(torch.uint8) * 255, few.labels)
    built = build_mnist_m(few, photographs, size=size)
    assert built.images.shape == (6, size, size, 3)
    assert built.labels.equal(few.labels)
    border = (size - 28) // 2
    for image, digit in zip(built.images.numpy(), few.images.numpy(), strict=True):
        padded = np.pad(digit, ((border, border), (border, border), (0, 0)))
        patch = np.where(padded == 255, 255 - image, image)
        assert sum(find_patch(patch, photograph) for photograph in photographs) == 1


def test_patches_depend_on_seed_and_place_alone(
    digits: ImageDataset, photographs: list[np.ndarray]
) -> None:
    built = build_mnist_m(digits.train, photographs)
    assert built.images.equal(build_mnist_m(digits.train, photographs).images)
    first = build_mnist_m(digits.train.subset(torch.arange(10)), photographs)
    assert built.images[:10].equal(first.images)
    other = build_mnist_m(digits.train, photographs, seed=1)
    assert (built.images != other.images).float().mean() > 0.5
    # Patches differ from digit to digit, in photograph and place.
    corners = built.images[:, :2, :2].flatten(1)
    assert len(torch.unique(corners, dim=0)) > 50


def test_written_files_are_read_back_and_photographs_may_be_files(
    digits: ImageDataset, photographs: list[np.ndarray], tmp_path: Path
) -> None:
    for number, photograph in enumerate(photographs):
        (tmp_path / "photographs").mkdir(exist_ok=True)
        Image.fromarray(photograph).save(tmp_path / "photographs" / f"{number}.png")
    parts = {
        part: build_mnist_m(image_set, tmp_path / "photographs", seed=seed)
        for seed, (part, image_set) in enumerate(digits.parts.items())
    }
    assert parts["train"].images.equal(build_mnist_m(digits.train, photographs).images)
    dataset = ImageDataset("mnist-m", parts["train"], parts["test"], digits.classes, "here")
    write_mnist_m(dataset, tmp_path / "data" / "mnist_m")
    lines = (tmp_path / "data/mnist_m/mnist_m_train_labels.txt").read_text().splitlines()
    assert lines[3] == f"00000003.png {digits.train.labels[3]}"
    for root in (tmp_path / "data", tmp_path / "data" / "mnist_m"):
        read = load_mnist_m(root)
        for got, wanted in zip(read.parts.values(), parts.values(), strict=True):
            assert got.images.equal(wanted.images)
            assert got.labels.equal(wanted.labels)


def png(size: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "PNG")
    return file.getvalue()


def write_files(folder: Path, names: list[str], lines: list[str]) -> None:
    for part in ("train", "test"):
        (folder / f"mnist_m_{part}").mkdir(parents=True)
        for name in names:
            (folder / f"mnist_m_{part}" / name).write_bytes(png(32))
        (folder / f"mnist_m_{part}_labels.txt").write_text("".join(f"{line}\n" for line in lines))


def test_every_wrong_line_is_listed(tmp_path: Path) -> None:
    lines = ["0.png 0", "", "1.png 10", "2.png", "0.png 1", "3.png 3", "4.png 4 4"]
    write_files(tmp_path, ["0.png", "1.png", "2.png", "4.png"], lines)
    with pytest.raises(DatasetError) as error:
        load_mnist_m(tmp_path)
    train = [p for p in error.value.problems if p.path.name == "mnist_m_train_labels.txt"]
    assert [(problem.row, problem.message) for problem in train] == [
        (3, "expected a file name and a digit in 0..9, got '1.png 10'"),
        (4, "expected a file name and a digit in 0..9, got '2.png'"),
        (5, "expected 0.png once, got it again"),
        (6, f"expected the image {tmp_path}/mnist_m_train/3.png, got no such file"),
        (7, "expected a file name and a digit in 0..9, got '4.png 4 4'"),
    ]
    assert len(error.value.problems) == 10


def test_every_damaged_image_is_listed(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(4)]
    write_files(tmp_path, names, [f"{name} 1" for name in names])
    folder = tmp_path / "mnist_m_train"
    (folder / "1.png").write_bytes(png(31))
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_bytes(png(32)[:60])
    with pytest.raises(DatasetError) as error:
        load_mnist_m(tmp_path)
    kinds = {problem.path.name: problem.kind for problem in error.value.problems}
    assert kinds.pop("3.png") in ("truncated", "corrupt")
    assert kinds == {"1.png": "odd", "2.png": "empty"}
    assert "expected an image of 32x32 pixels like the first, got 31x31" in str(error.value)


def test_building_refuses_what_does_not_fit(digits: ImageDataset, tmp_path: Path) -> None:
    grey = np.zeros((40, 40), np.uint8)
    assert build_mnist_m(digits.train, [grey]).images.shape == (60, 32, 32, 3)
    colour = ImageSet(digits.train.images.expand(-1, -1, -1, 3), digits.train.labels)
    for image_set, photographs, size, message in (
        (colour, [grey], 32, "expected grey digits of at most 32x32 pixels, got 28x28 in 3"),
        (digits.train, [grey], 20, "expected grey digits of at most 20x20 pixels, got 28x28 in 1"),
        (digits.train, [], 32, "expected at least one photograph"),
        (digits.train, tmp_path, 32, "expected at least one photograph"),
        (
            digits.train,
            [grey, grey[:31]],
            32,
            r"photographs\[1\]: expected .* got uint8 \[31, 40\]",
        ),
        (digits.train, [grey.astype(float)], 32, r"photographs\[0\]: expected .* got float64"),
    ):
        with pytest.raises(DatasetError, match=message):
            build_mnist_m(image_set, photographs, size=size)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"broken.png: expected"):
        build_mnist_m(digits.train, tmp_path)
