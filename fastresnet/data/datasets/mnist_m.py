# SPDX-License-Identifier: Apache-2.0
"""MNIST-M (Ganin and Lempitsky 2015): MNIST's digits blended with patches of colour photographs.

As published: folders ``mnist_m_train`` and ``mnist_m_test`` of 59,001 and 9,001 PNGs of 32x32
pixels, and ``mnist_m_train_labels.txt`` and ``mnist_m_test_labels.txt`` with a file name and a
digit a line. :func:`build_mnist_m` makes such images from any grey digits and photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastresnet.data.datasets.errors import DatasetError, Problem
from fastresnet.data.datasets.file_set import FileSet, read_file
from fastresnet.data.datasets.image_set import ImageDataset, ImageSet
from fastresnet.data.datasets.index import Entry, Index, find_files
from fastresnet.data.datasets.table import whole_number
from fastresnet.data.decode import ImageError, decode, read_header, upright

CLASSES = tuple(str(digit) for digit in range(10))

_PARTS = ("train", "test")


def recognises(folder: Path) -> bool:
    """Whether ``folder``, or a folder ``mnist_m`` in it, has the file of training labels."""
    return (_base(folder) / "mnist_m_train_labels.txt").is_file()


def load_mnist_m(folder: Path) -> ImageDataset:
    """Loads both parts into memory.

    Raises:
        DatasetError: a file is missing or damaged, a label is not a digit, or images differ in
            size; the error lists everything that is wrong.
    """
    index = index_mnist_m(folder)
    dataset = index.dataset(test_share=0)
    if dataset.test is None:
        raise DatasetError(f"{dataset.source}: the test part holds no image")
    return ImageDataset(
        name="mnist-m",
        train=_read_images(dataset.train, dataset.source),
        test=_read_images(dataset.test, dataset.source),
        classes=CLASSES,
        source=dataset.source,
    )


def index_mnist_m(folder: Path) -> Index:
    """Lists the entries of both parts and every problem in the files of labels."""
    base = _base(folder)
    index = Index("mnist-m", folder, CLASSES)
    listed: set[Path] = set()
    for part in _PARTS:
        path = base / f"mnist_m_{part}_labels.txt"
        images, _ = find_files(base / f"mnist_m_{part}")
        index.images += images
        present = set(images)
        entries = index.parts.setdefault(part, [])
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            index.error("header", path, f"expected a file of labels, got: {error}")
            continue
        index.label_files.append(path)
        for row, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, *rest = line.split()
            image = base / f"mnist_m_{part}" / name
            label = whole_number(rest[0]) if len(rest) == 1 else None
            if image in listed:
                index.error("duplicate", path, f"expected {name} once, got it again", row=row)
                continue
            listed.add(image)
            if image not in present:
                message = f"expected the image {image}, got no such file"
                index.error("missing", path, message, row=row)
            if label is None or label >= len(CLASSES):
                message = f"expected a file name and a digit in 0..9, got {line.strip()!r}"
                index.error("label", path, message, row=row)
            else:
                entries.append(Entry(image, label, rows=((path, row),)))
    index.find_orphans(listed)
    return index


def _base(folder: Path) -> Path:
    nested = folder / "mnist_m"
    return nested if nested.is_dir() else folder


def _read_images(file_set: FileSet, source: str) -> ImageSet:
    def read(path: Path) -> np.ndarray | Problem:
        try:
            return _read_rgb(path)
        except ImageError as error:
            return Problem(error.kind, path, None, str(error))

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, file_set.paths))
    problems = [result for result in results if isinstance(result, Problem)]
    shape = next((result.shape for result in results if isinstance(result, np.ndarray)), ())
    for path, result in zip(file_set.paths, results, strict=True):
        if isinstance(result, np.ndarray) and result.shape != shape:
            message = (
                f"expected an image of {shape[1]}x{shape[0]} pixels like the first, got "
                f"{result.shape[1]}x{result.shape[0]}"
            )
            problems.append(Problem("odd", path, None, message))
    if problems:
        raise DatasetError.listing(source, problems)
    return ImageSet(torch.from_numpy(np.stack(results)), file_set.labels)


def _read_rgb(path: Path) -> np.ndarray:
    data = read_file(path)
    header = read_header(data)
    return upright(decode(data, header), header.orientation)[..., :3]


def build_mnist_m(
    digits: ImageSet,
    photographs: Path | Sequence[np.ndarray],
    *,
    size: int = 32,
    seed: int = 0,
) -> ImageSet:
    """Blends digits with patches of photographs as in Ganin and Lempitsky (2015), section 5.2.1.

    A pixel is |patch - digit|, channel by channel. The photograph and the place of the patch in
    it are random, and depend on the seed and the place of the digit in ``digits`` alone.

    Args:
        digits: grey, of at most ``size`` pixels a side; smaller ones get a black border, in which
            the photograph stays as it is.
        photographs: a folder, or uint8 [H, W, 3] or [H, W] each; the paper took BSDS500's.
        size: of the patches: 32 as published, or 28 for digits without a border.
        seed: of the patches.

    Returns:
        uint8 [N, size, size, 3] with the labels of ``digits``.

    Raises:
        DatasetError: digits are in colour or too large, there is no photograph, or one is smaller
            than a patch or cannot be read.
    """
    height, width, channels = digits.images.shape[1:]
    if channels != 1 or max(height, width) > size:
        raise DatasetError(
            f"expected grey digits of at most {size}x{size} pixels, got {height}x{width} in "
            f"{channels} channels"
        )
    backgrounds = _backgrounds(photographs, size)
    top, left = (size - height) // 2, (size - width) // 2
    padded = F.pad(
        digits.images,
        (0, 0, left, size - width - left, top, size - height - top),
    )
    random = np.random.Philox(key=seed).random_raw(3 * len(digits)).reshape(-1, 3)
    images = padded.numpy().repeat(3, axis=3)
    for image, (which, row, column) in zip(images, random, strict=True):
        background = backgrounds[int(which % np.uint64(len(backgrounds)))]
        y = int(row % np.uint64(background.shape[0] - size + 1))
        x = int(column % np.uint64(background.shape[1] - size + 1))
        patch = background[y : y + size, x : x + size]
        # |patch - digit| without leaving bytes.
        image[:] = np.maximum(patch, image) - np.minimum(patch, image)
    return ImageSet(torch.from_numpy(images), digits.labels.clone())


def _backgrounds(photographs: Path | Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    if isinstance(photographs, Path):
        paths, _ = find_files(photographs)
        named = []
        for path in paths:
            try:
                named.append((str(path), _read_rgb(path)))
            except ImageError as error:
                raise DatasetError.at(path, str(error), kind=error.kind) from error
    else:
        named = [(f"photographs[{i}]", np.asarray(p)) for i, p in enumerate(photographs)]
    if not named:
        raise DatasetError(f"expected at least one photograph, got none in {photographs}")
    for name, pixels in named:
        if (
            pixels.dtype != np.uint8
            or pixels.shape[2:] not in ((), (3,))
            or min(pixels.shape[:2]) < size
        ):
            raise DatasetError(
                f"{name}: expected a photograph as uint8 [H, W, 3] or [H, W] of at least "
                f"{size}x{size} pixels, got {pixels.dtype} {list(pixels.shape)}"
            )
    return [pixels if pixels.ndim == 3 else pixels[..., None] for _, pixels in named]


def write_mnist_m(dataset: ImageDataset, folder: Path) -> None:
    """Writes colour images in the published layout, as PNGs."""
    for part, image_set in dataset.parts.items():
        images = folder / f"mnist_m_{part}"
        images.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, (image, label) in enumerate(
            zip(image_set.images.numpy(), image_set.labels.tolist(), strict=True)
        ):
            name = f"{number:08}.png"
            Image.fromarray(image).save(images / name)
            lines.append(f"{name} {label}\n")
        (folder / f"mnist_m_{part}_labels.txt").write_text("".join(lines))
