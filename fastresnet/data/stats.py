# SPDX-License-Identifier: Apache-2.0
"""What a data set is made of: labels, sizes, and the mean and deviation of its pixels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastresnet.data.datasets.errors import DatasetError, Problem
from fastresnet.data.datasets.file_set import FileDataset, FileSet, read_file, read_file_header
from fastresnet.data.datasets.image_set import ImageSet
from fastresnet.data.datasets.registry import Dataset
from fastresnet.data.decode import ImageError, decode, read_header
from fastresnet.data.parallel import Progress, map_in_order, report

_LEVELS = 256
_SAMPLE = 1000


@dataclass(frozen=True)
class DatasetStats:
    """The figures of a data set.

    Args:
        counts: images of each class, by part.
        class_weights: of each class, inverse to its share of the training part, so that the mean
            over the training images is 1; 0 for a class without any. For ``torch``'s losses.
        sizes: images by (width, height), upright, in all parts.
        sample: training images that the following were computed from.
        mean, std: of each channel, of pixels in 0..1. Every image counts alike, whatever its size,
            as it does in training.
        levels: float64 [channels, 256], the share of pixels at each level.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    class_weights: tuple[float, ...]
    sizes: dict[tuple[int, int], int]
    sample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    levels: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {
            part: {
                "images": sum(counts),
                "counts": list(counts),
                "shares": [count / sum(counts) for count in counts],
            }
            for part, counts in self.counts.items()
        }
        return {
            "name": self.name,
            "source": self.source,
            "classes": list(self.classes),
            "parts": parts,
            "class_weights": list(self.class_weights),
            "sizes": [
                {"width": width, "height": height, "images": images}
                for (width, height), images in self.sizes.items()
            ],
            "sample": self.sample,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def dataset_stats(
    dataset: Dataset,
    *,
    sample: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DatasetStats:
    """Counts labels and sizes, and computes mean and standard deviation.

    Args:
        sample: the number of training images, drawn by ``seed``, whose pixels are looked at; by
            default all of a set in memory, and 1,000 of a set of files. More than there are: all.
        threads: that read and decode files; None: one a processor.
        progress: is told how many of how many files are done.

    Raises:
        DatasetError: files cannot be read; the error lists all of them.
        ValueError: ``sample`` is less than 1.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"expected a sample of at least 1 image, got {sample}")
    train = dataset.train
    if sample is None:
        sample = _SAMPLE if isinstance(train, FileSet) else len(train)
    sample = min(sample, len(train))
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(train))
    chosen = np.sort(order[:sample])
    if isinstance(train, ImageSet):
        height, width = train.images.shape[1:3]
        sizes = {(width, height): sum(map(len, dataset.parts.values()))}
        levels = _image_set_levels(train, chosen)
    else:
        sizes, levels = _file_levels(dataset, chosen, threads=threads, progress=progress)
    counts = {
        part: tuple(torch.bincount(images.labels, minlength=len(dataset.classes)).tolist())
        for part, images in dataset.parts.items()
    }
    mean, std = _moments(levels)
    return DatasetStats(
        name=dataset.name,
        source=dataset.source,
        classes=dataset.classes,
        counts=counts,
        class_weights=_class_weights(counts["train"]),
        sizes=sizes,
        sample=sample,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        levels=levels,
    )


def _class_weights(counts: tuple[int, ...]) -> tuple[float, ...]:
    present = sum(count > 0 for count in counts)
    return tuple(sum(counts) / (present * count) if count else 0.0 for count in counts)


def _moments(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel from its shares of the 256 levels."""
    values = np.arange(_LEVELS) / (_LEVELS - 1)
    mean = levels @ values
    # About the mean: the difference of two large numbers would lose digits.
    return mean, np.sqrt((levels * (values - mean[:, None]) ** 2).sum(axis=1))


def _image_set_levels(image_set: ImageSet, chosen: np.ndarray) -> np.ndarray:
    channels = image_set.images.shape[3]
    counts = np.zeros((channels, _LEVELS), dtype=np.int64)
    for part in np.array_split(chosen, max(len(chosen) // 1000, 1)):
        pixels = image_set.images[torch.from_numpy(part)].reshape(-1, channels)
        counts += [np.bincount(values, minlength=_LEVELS) for values in pixels.T.numpy()]
    return counts / counts.sum(axis=1, keepdims=True)


def _file_levels(
    dataset: FileDataset, chosen: np.ndarray, *, threads: int | None, progress: Progress | None
) -> tuple[dict[tuple[int, int], int], np.ndarray]:
    """The sizes of all files, the most frequent first, and the levels of those chosen."""
    sampled = {dataset.train.paths[index] for index in chosen}
    paths = [path for part in dataset.parts.values() for path in part.paths]

    def look(path: Path) -> tuple[tuple[int, int], np.ndarray | None] | Problem:
        try:
            return _look(path, pixels=path in sampled)
        except ImageError as error:
            return Problem(error.kind, path, None, str(error))

    sizes: Counter[tuple[int, int]] = Counter()
    levels = np.zeros((3, _LEVELS))
    problems = []
    for result in report(map_in_order(look, paths, threads=threads), len(paths), progress):
        if isinstance(result, Problem):
            problems.append(result)
            continue
        size, shares = result
        sizes[size] += 1
        if shares is not None:
            levels += shares
    if problems:
        raise DatasetError.listing(dataset.source, problems)
    return dict(sizes.most_common()), levels / len(sampled)


def _look(path: Path, *, pixels: bool) -> tuple[tuple[int, int], np.ndarray | None]:
    """The upright (width, height) of a file, and if asked for the share of pixels at each level."""
    if not pixels:
        header = read_file_header(path)
        return (header.upright_width, header.upright_height), None
    data = read_file(path)
    header = read_header(data)
    image = decode(data, header)
    height, width = image.shape[:2]
    # Twenty times as fast as numpy's bincount.
    counts = Image.frombuffer("RGBX", (width, height), image, "raw", "RGBX", 0, 1).histogram()
    levels = np.reshape(counts, (4, _LEVELS))[:3] / (height * width)
    return (header.upright_width, header.upright_height), levels
