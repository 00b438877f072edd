# SPDX-License-Identifier: Apache-2.0
"""A CSV file that lists images, classes and parts, as Kaggle's sets of birds and butterflies have.

Its columns are ``filepaths`` (relative to the folder), ``labels`` (the name of the class), ``data
set`` (train, valid or test) and perhaps ``class id`` or ``class index`` (the number of the class);
others, such as ``scientific name``, are passed over.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from fastresnet.data.datasets.errors import DatasetError
from fastresnet.data.datasets.file_set import FileDataset
from fastresnet.data.datasets.image_set import ImageSet, check_labels
from fastresnet.data.datasets.index import Entry, Index, find_files
from fastresnet.data.datasets.table import Row, find_column, whole_number

_COLUMNS = ("filepaths", "labels", "data set")
_PARTS = {
    "train": "train",
    "valid": "validation",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
_FOLDERS = {"train": "train", "validation": "valid", "test": "test"}


def recognises(folder: Path) -> bool:
    """Whether a CSV file in ``folder`` has the three columns."""
    return bool(_find_lists(folder))


def load_image_csv(
    folder: Path, *, test_share: float = 0.2, seed: int = 0, allow_missing: bool = False
) -> FileDataset:
    """Loads the names of the images and their classes; no image is opened.

    Args:
        folder: where the CSV file is.
        test_share: where all images are in the training part, the share of it, of every class in
            proportion, that becomes the test part.
        seed: the seed of that split.
        allow_missing: keep images whose file is missing; reading one raises an error.

    Raises:
        DatasetError: rows are wrong, contradict each other, or name an image that is not there.
    """
    return index_image_csv(folder).dataset(
        test_share=test_share, seed=seed, allow_missing=allow_missing
    )


def index_image_csv(folder: Path) -> Index:
    """Lists the entries of each part and every problem in the CSV file."""
    index = Index("image-csv", folder)
    lists = _find_lists(folder)
    if len(lists) != 1:
        got = ", ".join(path.name for path in lists) or "none"
        message = (
            f"expected one CSV file with the columns filepaths, labels and data set, got {got}"
        )
        index.error("header", folder, message)
        return index
    (path,) = lists
    index.images, _ = find_files(folder)
    header, *rows = index.read_rows(path) or [Row(1, ())]
    if None in [find_column(header, name) for name in _COLUMNS]:
        return index
    columns = {name: find_column(header, name) for name in _COLUMNS}
    if (number := find_column(header, "class id", "class index")) is not None:
        columns["class id"] = number
    complete = []
    for row in rows:
        if len(row.cells) < len(header.cells):
            message = f"expected {len(header.cells)} columns, got {len(row.cells)}"
            index.error("label", path, message, row=row.number)
        else:
            cells = {name: row.cells[column] for name, column in columns.items()}
            complete.append((row.number, cells))
    numbers = _class_numbers(index, path, complete)
    index.classes = tuple(sorted(numbers, key=numbers.__getitem__))
    seen: dict[Path, int] = {}
    present = set(index.images)
    for row, cells in complete:
        part = _PARTS.get(cells["data set"].lower())
        if part is None:
            message = f"expected train, valid or test, got {cells['data set']!r}"
            index.error("label", path, message, row=row)
        # Some of these files were written on Windows.
        relative = PurePosixPath(cells["filepaths"].replace("\\", "/"))
        if not relative.parts or relative.is_absolute() or ".." in relative.parts:
            message = f"expected a path within the folder, got {cells['filepaths']!r}"
            index.error("label", path, message, row=row)
            continue
        image = folder / relative
        if image in seen:
            message = f"expected each image once, got {relative} again, as in row {seen[image]}"
            index.error("duplicate", path, message, row=row)
            continue
        seen[image] = row
        if image not in present and not image.is_file():
            index.error("missing", path, f"expected the image {image}, got no such file", row=row)
        if part is not None and cells["labels"] in numbers:
            entry = Entry(image, numbers[cells["labels"]], rows=((path, row),))
            index.parts.setdefault(part, []).append(entry)
    index.find_orphans(seen)
    return index


def _find_lists(folder: Path) -> list[Path]:
    lists = []
    for path in sorted(folder.glob("*.csv")):
        try:
            with path.open(encoding="utf-8-sig") as file:
                header = Row(1, tuple(cell.strip(' "\r\n') for cell in file.readline().split(",")))
        except (OSError, UnicodeDecodeError):
            continue
        if None not in [find_column(header, name) for name in _COLUMNS]:
            lists.append(path)
    return lists


def _class_numbers(
    index: Index, path: Path, rows: list[tuple[int, dict[str, str]]]
) -> dict[str, int]:
    """The number of each class: the file's own where it has a column of them, else alphabetical."""
    names = sorted({cells["labels"] for _, cells in rows if cells["labels"]})
    for row, cells in rows:
        if not cells["labels"]:
            index.error("label", path, "expected the name of a class, got none", row=row)
    if not rows or "class id" not in rows[0][1]:
        return {name: number for number, name in enumerate(names)}
    numbers: dict[str, int] = {}
    owners: dict[int, str] = {}
    for row, cells in rows:
        name, number = cells["labels"], whole_number(cells["class id"])
        if not name:
            continue
        if number is None or number >= len(names):
            message = f"expected a class id in 0..{len(names) - 1}, got {cells['class id']!r}"
            index.error("label", path, message, row=row)
        elif numbers.setdefault(name, number) != number:
            message = f"expected class id {numbers[name]} for {name}, as before, got {number}"
            index.error("label", path, message, row=row)
        elif owners.setdefault(number, name) != name:
            message = f"expected {owners[number]} for class id {number}, as before, got {name}"
            index.error("label", path, message, row=row)
    if numbers.keys() != set(names) or len(set(numbers.values())) != len(names):
        # The errors above say what is wrong; entries get numbers all the same.
        return {name: number for number, name in enumerate(names)}
    return numbers


def write_image_csv(
    parts: Mapping[str, ImageSet], classes: Sequence[str], folder: Path, *, quality: int = 95
) -> None:
    """Writes images of any origin in the layout above, and as an image folder at the same time, as
    a stand-in for the real data.

    Args:
        parts: by name, of "train", "validation" and "test"; images in 1 or 3 channels.
        classes: the names of the classes.
        folder: where ``images.csv`` and the folders ``train``, ``valid`` and ``test`` go.
        quality: of the JPEGs, without chroma subsampling.

    Raises:
        DatasetError: a part has another name, or a label is none of a class.
    """
    rows = [("class id", "filepaths", "labels", "data set")]
    for part, images in parts.items():
        if part not in _FOLDERS:
            raise DatasetError(f"expected parts of {', '.join(_FOLDERS)}, got {part!r}")
        check_labels(images.labels, tuple(classes), source=str(folder), part=part)
        for number, label in enumerate(images.labels.tolist()):
            # A name may have what a path cannot.
            name = f"{_FOLDERS[part]}/{classes[label].replace('/', '-')}/{number:05}.jpg"
            rows.append((str(label), name, classes[label], _FOLDERS[part]))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = images.images[number].numpy()
            image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            image.save(folder / name, quality=quality, subsampling="4:4:4")
    with (folder / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
