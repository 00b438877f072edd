# SPDX-License-Identifier: Apache-2.0
"""Kaggle's Diabetic Retinopathy Detection (2015): photographs of eyes, graded 0 to 4.

Two layouts of the files of labels are read; the images, ``NAME.jpeg`` (or ``.jpg``, ``.png``),
lie anywhere below the folder.

- Kaggle's own: ``trainLabels.csv`` with the columns ``image`` and ``level``, and perhaps
  ``testLabels.csv`` or ``retinopathy_solution.csv`` with the same columns.
- Four files of one column each, with or without a header: ``train_img.csv`` (names without
  suffix), ``train_label.csv`` (grades), ``test_img.csv``, ``test_label.csv``.

A name is the patient's number with ``_left`` or ``_right`` behind it; both eyes of a patient are
one group. Some of Kaggle's files are known to be bad (492_right, 25313_right, 27096_right):
nothing here leaves them out, checking the files finds them.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastresnet.data.datasets.errors import DatasetError
from fastresnet.data.datasets.file_set import FileDataset
from fastresnet.data.datasets.index import IMAGE_SUFFIXES, Entry, Index, find_files
from fastresnet.data.datasets.table import Row, find_column, whole_number

CLASSES = ("no DR", "mild", "moderate", "severe", "proliferative DR")

_KAGGLE = {"train": ("trainLabels.csv",), "test": ("testLabels.csv", "retinopathy_solution.csv")}
_COLUMNS = ("train_img.csv", "train_label.csv", "test_img.csv", "test_label.csv")
_EYE = re.compile(r"(.+)_(?:left|right)", re.IGNORECASE)
# What stands above a column of names; pandas writes 0 above a column that has none.
_HEADERS = {"image", "images", "img", "name", "names", "file", "filename", "id", "image id", "0"}


def recognises(folder: Path) -> bool:
    """Whether ``folder`` has one of the two layouts' files of training labels."""
    return (folder / "trainLabels.csv").is_file() or (folder / "train_img.csv").is_file()


def load_retinopathy(
    folder: Path,
    *,
    images: Path | None = None,
    test_share: float = 0.2,
    seed: int = 0,
    allow_missing: bool = False,
) -> FileDataset:
    """Loads the data set's names, grades and patients; no image is opened.

    Args:
        folder: where the files of labels are.
        images: where the images are, if not below ``folder``, or not all that are there.
        test_share: where no file lists a test part, the share of the training part, by patients,
            that becomes it.
        seed: the seed of that split.
        allow_missing: keep images whose file is missing; reading one raises an error.

    Raises:
        DatasetError: a file of labels is missing or wrong, or names an image that is not there.
    """
    return index_retinopathy(folder, images=images).dataset(
        test_share=test_share, seed=seed, allow_missing=allow_missing
    )


@dataclass(frozen=True)
class _Line:
    """An image's name and grade as written, and the lines (file, number) that say so: the name's
    first, the grade's last."""

    name: str
    grade: str
    rows: tuple[tuple[Path, int], ...]


def index_retinopathy(folder: Path, *, images: Path | None = None) -> Index:
    """Lists the entries of both parts and every problem in the files of labels."""
    index = Index("retinopathy", folder, CLASSES)
    index.images, _ = find_files(folder if images is None else images)
    found: dict[str, list[Path]] = {}
    for path in index.images:
        found.setdefault(path.stem, []).append(path)
    read = _kaggle_lines if (folder / "trainLabels.csv").is_file() else _column_lines
    seen: dict[str, tuple[Path, int]] = {}
    for part, lines in read(index, found).items():
        index.parts[part] = _entries(index, lines, found, seen)
    index.find_orphans(path for name in seen for path in found.get(name, []))
    _note_shared_patients(index)
    return index


def _entries(
    index: Index,
    lines: list[_Line],
    found: dict[str, list[Path]],
    seen: dict[str, tuple[Path, int]],
) -> list[Entry]:
    """The entries of a part; ``found`` has the files of each name, ``seen`` the line of each."""
    # A missing image is looked for where the others are.
    parents = Counter(found[line.name][0].parent for line in lines if line.name in found)
    usual = parents.most_common(1)[0][0] if parents else index.folder
    entries = []
    for line in lines:
        name, (path, row) = line.name, line.rows[0]
        if not name:
            index.error("label", path, "expected a name, got none", row=row)
            continue
        if name in seen:
            first = ":".join(map(str, seen[name]))
            message = f"expected each image once, got {name} again, as in {first}"
            index.error("duplicate", path, message, row=row)
            continue
        seen[name] = path, row
        image, *others = found.get(name, [usual / f"{name}.jpeg"])
        if others:
            message = f"expected one image of {name}, got {', '.join(map(str, [image, *others]))}"
            index.error("duplicate", path, message, row=row)
        elif name not in found:
            message = f"expected the image {image}, got no such file"
            index.error("missing", path, message, row=row)
        grade = whole_number(line.grade)
        if grade is None or grade >= len(CLASSES):
            path, row = line.rows[-1]
            message = f"expected a grade in 0..{len(CLASSES) - 1}, got {line.grade!r}"
            index.error("label", path, message, row=row)
        else:
            entries.append(Entry(image, grade, _patient(name), line.rows))
    return entries


def _kaggle_lines(index: Index, found: dict[str, list[Path]]) -> dict[str, list[_Line]]:
    lines: dict[str, list[_Line]] = {}
    for part, names in _KAGGLE.items():
        paths = [index.folder / name for name in names if (index.folder / name).is_file()]
        if not paths:
            continue
        path = paths[0]
        lines[part] = []
        rows = index.read_rows(path)
        if not rows:
            continue
        header, *rest = rows
        columns = find_column(header, "image"), find_column(header, "level")
        if None in columns:
            got = ",".join(header.cells)
            message = f"expected a header with the columns image and level, got {got!r}"
            index.error("header", path, message, row=header.number)
            continue
        for row in rest:
            if len(row.cells) <= max(columns):
                message = f"expected {len(header.cells)} columns, got {len(row.cells)}"
                index.error("label", path, message, row=row.number)
                continue
            name, grade = (row.cells[column] for column in columns)
            lines[part].append(_Line(_stem(name), grade, ((path, row.number),)))
    return lines


def _column_lines(index: Index, found: dict[str, list[Path]]) -> dict[str, list[_Line]]:
    lines: dict[str, list[_Line]] = {}
    for part in ("train", "test"):
        paths = [index.folder / f"{part}_{kind}.csv" for kind in ("img", "label")]
        present = [path.is_file() for path in paths]
        if part == "test" and not any(present):
            continue
        lines[part] = []
        if not all(present):
            index.error("header", paths[present.index(False)], "expected this file, got none")
            continue
        names, grades = (_column(index, path) for path in paths)
        if not names or not grades:
            continue
        names, grades = _without_headers(names, grades, found)
        if len(names) != len(grades):
            index.error(
                "label",
                paths[1],
                f"expected {len(names)} grades, one for each name in {paths[0].name}, "
                f"got {len(grades)}",
            )
            continue
        lines[part] = [
            _Line(
                _stem(name.cells[0]),
                grade.cells[0],
                ((paths[0], name.number), (paths[1], grade.number)),
            )
            for name, grade in zip(names, grades, strict=True)
        ]
    return lines


def _column(index: Index, path: Path) -> list[Row]:
    rows = index.read_rows(path)
    wide = next((row for row in rows if len(row.cells) != 1), None)
    if wide is not None:
        message = f"expected one column, got {len(wide.cells)}"
        index.error("header", path, message, row=wide.number)
        return []
    return rows


def _without_headers(
    names: list[Row], grades: list[Row], found: dict[str, list[Path]]
) -> tuple[list[Row], list[Row]]:
    """Leaves out the header of either column, if it has one."""
    first_name, first_grade = names[0].cells[0], grades[0].cells[0]
    unknown = _stem(first_name) not in found
    name_header = unknown and first_name.lower().replace("_", " ") in _HEADERS
    grade_header = whole_number(first_grade) is None
    # Where one column seems to have a header and the other not, their lengths decide.
    if len(names) - name_header != len(grades) - grade_header and len(names) == len(grades):
        if unknown and grade_header and len(names) > 1 and _stem(names[1].cells[0]) in found:
            name_header = True  # under a word of the user's own
        elif name_header and first_grade == "0":
            grade_header = True  # pandas' header of a column without a name
        elif grade_header:
            grade_header = False  # the first grade is not a number: an error, and not a header
    return names[name_header:], grades[grade_header:]


def _stem(name: str) -> str:
    lower = name.lower()
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if lower.endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _patient(name: str) -> str:
    eye = _EYE.fullmatch(name)
    return eye[1] if eye else name


def _note_shared_patients(index: Index) -> None:
    patients = {part: {entry.group for entry in entries} for part, entries in index.parts.items()}
    shared = patients.get("train", set()) & patients.get("test", set())
    if shared:
        index.note(
            "leak",
            index.folder,
            f"expected each patient in one part, got {len(shared)} with eyes in both the training "
            f"and the test part, such as {min(shared)}",
        )


def write_retinopathy(
    images: Sequence[np.ndarray] | Sequence[Tensor] | Tensor,
    grades: Sequence[int] | Tensor,
    groups: Sequence[int] | Tensor | None,
    folder: Path,
    *,
    test: Sequence[int] | None = None,
    quality: int = 95,
) -> None:
    """Writes images of any origin in one of the layouts above, as a stand-in for the real data.

    Args:
        images: uint8 [H, W, 3], [H, W, 1] or [H, W] each.
        grades: an integer in 0..4 for each image.
        groups: the patient of each image, at most two images a patient: the first becomes
            ``PATIENT_left``, the second ``PATIENT_right``. None: each image is another's.
        folder: where the files go; images go into ``images`` there.
        test: indices of the test images. Given, the four files of one column are written, with
            headers; None writes ``trainLabels.csv`` with everything.
        quality: of the JPEGs, without chroma subsampling.

    Raises:
        DatasetError: the arguments differ in length, a grade is out of range, a patient has more
            than two images, or an image has another shape or dtype.
    """
    grades = [int(grade) for grade in grades]
    patients = [int(group) for group in groups] if groups is not None else list(range(len(images)))
    if not len(images) == len(grades) == len(patients):
        raise DatasetError(
            f"expected a grade and a group for each of {len(images)} images, got {len(grades)} "
            f"grades and {len(patients)} groups"
        )
    if grades and not 0 <= min(grades) <= max(grades) < len(CLASSES):
        raise DatasetError(
            f"expected grades in 0..{len(CLASSES) - 1}, got {min(grades)}..{max(grades)}"
        )
    eyes: Counter[int] = Counter()
    names = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image, patient in zip(images, patients, strict=True):
        if eyes[patient] == 2:
            raise DatasetError(f"expected at most two images of a patient, got more of {patient}")
        names.append(f"{patient}_{('left', 'right')[eyes[patient]]}")
        eyes[patient] += 1
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (1,), (3,)):
            raise DatasetError(
                f"expected images as uint8 [H, W, 3], [H, W, 1] or [H, W], got {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        if pixels.shape[2:] == (1,):
            pixels = pixels[..., 0]
        Image.fromarray(pixels).save(
            folder / "images" / f"{names[-1]}.jpeg", quality=quality, subsampling="4:4:4"
        )
    if test is None:
        rows = zip(names, grades, strict=True)
        _write_csv(folder / "trainLabels.csv", [("image", "level"), *rows])
        return
    held_out = set(test)
    for part in ("train", "test"):
        members = [i for i in range(len(names)) if (i in held_out) == (part == "test")]
        columns = {"img": ("image", names), "label": ("level", grades)}
        for kind, (header, values) in columns.items():
            rows = [(header,), *((values[i],) for i in members)]
            _write_csv(folder / f"{part}_{kind}.csv", rows)


def _write_csv(path: Path, rows: Sequence[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
