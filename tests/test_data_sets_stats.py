# SPDX-License-Identifier: Apache-2.0
"""The figures of a data set, against numpy and scikit-learn on the whole of a small one."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from fastresnet.data import (
    DatasetError,
    FileDataset,
    ImageDataset,
    ImageSet,
    open_dataset,
    write_retinopathy,
)
from fastresnet.data.decode import decode
from fastresnet.data.stats import dataset_stats
from fastresnet.data.stats_figure import plot_stats


def write_images(folder: Path, shapes: list[tuple[int, int]], grades: list[int]) -> FileDataset:
    random = np.random.default_rng(0)
    images = [
        random.normal((180, 90, 40), (30, 60, 90), (*shape, 3)).clip(0, 255).astype(np.uint8)
        for shape in shapes
    ]
    write_retinopathy(images, grades, None, folder)
    return open_dataset(folder, test_share=0)


def pixels(dataset: FileDataset) -> list[np.ndarray]:
    train = dataset.train
    return [decode(train.read(index))[..., :3] / 255.0 for index in range(len(train))]


def test_figures_are_numpys_on_images_of_one_size(tmp_path: Path) -> None:
    dataset = write_images(tmp_path, [(40, 60)] * 6, [0, 0, 0, 1, 2, 4])
    stats = dataset_stats(dataset)
    whole = np.concatenate([image.reshape(-1, 3) for image in pixels(dataset)])
    assert stats.mean == pytest.approx(whole.mean(axis=0), abs=1e-12)
    assert stats.std == pytest.approx(whole.std(axis=0), abs=1e-12)
    assert stats.counts == {"train": (3, 1, 1, 0, 1)}
    assert stats.sizes == {(60, 40): 6}
    assert stats.sample == 6


def test_images_count_alike_whatever_their_size(tmp_path: Path) -> None:
    dataset = write_images(tmp_path, [(16, 16), (64, 96), (64, 96)], [0, 1, 2])
    stats = dataset_stats(dataset)
    images = pixels(dataset)
    mean = np.mean([image.mean(axis=(0, 1)) for image in images], axis=0)
    square = np.mean([((image - mean) ** 2).mean(axis=(0, 1)) for image in images], axis=0)
    assert stats.mean == pytest.approx(mean, abs=1e-12)
    assert stats.std == pytest.approx(np.sqrt(square), abs=1e-12)
    assert list(stats.sizes.items()) == [((96, 64), 2), ((16, 16), 1)]


def test_sizes_are_upright(tmp_path: Path) -> None:
    dataset = write_images(tmp_path, [(16, 24)] * 2, [0, 1])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 16)).save(dataset.train.paths[0], exif=exif)
    assert dataset_stats(dataset).sizes == {(16, 24): 1, (24, 16): 1}
    assert dataset_stats(dataset, sample=1).sizes == {(16, 24): 1, (24, 16): 1}


def test_a_sample_is_drawn_by_its_seed(tmp_path: Path) -> None:
    dataset = write_images(tmp_path, [(16, 16)] * 30, [0, 1, 2, 3, 4] * 6)
    first, same, other = (dataset_stats(dataset, sample=5, seed=seed) for seed in (0, 0, 1))
    assert first.sample == 5
    assert (first.mean, first.std) == (same.mean, same.std)
    assert first.mean != other.mean
    threads = dataset_stats(dataset, sample=5, threads=1)
    assert (first.mean, first.std) == (threads.mean, threads.std)
    assert dataset_stats(dataset, sample=99).sample == 30
    with pytest.raises(ValueError, match="expected a sample of at least 1 image, got 0"):
        dataset_stats(dataset, sample=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_sets_in_memory_are_looked_at_whole(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2500, 8, 12, channels), generator=generator).to(torch.uint8)
    labels = torch.arange(2500) % 3
    train = ImageSet(images, labels)
    test = ImageSet(images[:10], labels[:10])
    stats = dataset_stats(ImageDataset("n", train, test, ("a", "b", "c"), "here"))
    values = images.numpy().reshape(-1, channels) / 255
    assert stats.mean == pytest.approx(values.mean(axis=0), abs=1e-12)
    assert stats.std == pytest.approx(values.std(axis=0), abs=1e-12)
    assert stats.sizes == {(12, 8): 2510}
    assert stats.counts == {"train": (834, 833, 833), "test": (4, 3, 3)}
    assert stats.sample == 2500


def test_deviation_keeps_its_digits_far_from_zero() -> None:
    images = torch.full((3, 64, 64, 1), 254, dtype=torch.uint8)
    images[0, 0, 0] = 255
    train = ImageSet(images, torch.zeros(3, dtype=torch.int64))
    stats = dataset_stats(ImageDataset("n", train, train, ("a",), "here"))
    assert stats.std[0] == pytest.approx((images.numpy() / 255).std(), rel=1e-9)


def test_class_weights_are_scikit_learns_balanced_ones(tmp_path: Path) -> None:
    grades = [0] * 7 + [1, 1, 3]
    stats = dataset_stats(write_images(tmp_path, [(8, 8)] * 10, grades))
    theirs = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=np.array(grades))
    assert np.array(stats.class_weights)[[0, 1, 3]] == pytest.approx(theirs)
    assert (stats.class_weights[2], stats.class_weights[4]) == (0, 0)
    assert np.mean([stats.class_weights[grade] for grade in grades]) == pytest.approx(1)


def test_files_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    dataset = write_images(tmp_path, [(8, 8)] * 4, [0, 1, 2, 3])
    dataset.train.paths[1].write_bytes(b"")
    dataset.train.paths[2].unlink()
    with pytest.raises(DatasetError) as error:
        dataset_stats(dataset)
    kinds = [(problem.path, problem.kind) for problem in error.value.problems]
    assert kinds == [(dataset.train.paths[1], "empty"), (dataset.train.paths[2], "missing")]


def test_json_and_figure(tmp_path: Path) -> None:
    dataset = write_images(tmp_path, [(8, 8 + width) for width in range(20)], [0, 1, 2, 3] * 5)
    stats = dataset_stats(dataset)
    values = json.loads(json.dumps(stats.to_dict()))
    assert values["parts"]["train"]["counts"] == [5, 5, 5, 5, 0]
    assert values["parts"]["train"]["shares"][0] == 0.25
    assert len(values["sizes"]) == 20
    assert values["mean"] == list(stats.mean)
    plot_stats(tmp_path / "stats.png", stats)
    assert matplotlib.image.imread(tmp_path / "stats.png").std() > 0.01


def test_a_figure_of_many_classes_and_one_channel(tmp_path: Path) -> None:
    images = torch.zeros(100, 8, 8, 1, dtype=torch.uint8)
    train = ImageSet(images, torch.arange(100))
    dataset = ImageDataset("n", train, train, tuple(map(str, range(100))), "here")
    plot_stats(tmp_path / "stats.png", dataset_stats(dataset))
    assert matplotlib.image.imread(tmp_path / "stats.png").std() > 0.01
