# SPDX-License-Identifier: Apache-2.0
"""The retinopathy set's layouts: what is read, what is tolerated, and how errors are placed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastresnet.data import DatasetError, load_retinopathy, write_retinopathy
from fastresnet.data.datasets.retinopathy import CLASSES, index_retinopathy
from fastresnet.data.decode import decode

NAMES = ("10_left", "10_right", "13_left", "13_right", "15_left")
GRADES = (0, 2, 1, 4, 0)


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def write_lines(path: Path, *lines: object) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def write_columns(folder: Path, part: str, names: list[object], grades: list[object]) -> None:
    write_lines(folder / f"{part}_img.csv", *names)
    write_lines(folder / f"{part}_label.csv", *grades)


def problems(folder: Path) -> list[str]:
    with pytest.raises(DatasetError) as error:
        load_retinopathy(folder)
    return [str(problem).removeprefix(f"{folder}/") for problem in error.value.problems]


@pytest.mark.parametrize(
    ("name_header", "grade_header"),
    [
        ([], []),
        (["image"], ["level"]),
        (["0"], ["0"]),  # as pandas writes a column without a name
        (["image"], []),
        ([], ["level"]),
        (["photograph"], ["grade"]),
        (["0"], []),
    ],
)
def test_four_files_with_or_without_headers(
    tmp_path: Path, name_header: list[str], grade_header: list[str]
) -> None:
    touch(tmp_path / "new_train", *(f"{name}.jpeg" for name in NAMES[:3]))
    touch(tmp_path / "new_test", "13_right.JPG", "15_left.png")
    write_columns(tmp_path, "train", [*name_header, *NAMES[:3]], [*grade_header, *GRADES[:3]])
    write_columns(tmp_path, "test", [*name_header, *NAMES[3:]], [*grade_header, *GRADES[3:]])
    dataset = load_retinopathy(tmp_path)
    assert [path.stem for path in dataset.train.paths] == list(NAMES[:3])
    assert [path.name for path in dataset.test.paths] == ["13_right.JPG", "15_left.png"]
    assert dataset.train.labels.tolist() == list(GRADES[:3])
    assert dataset.test.labels.tolist() == list(GRADES[3:])
    assert dataset.classes == CLASSES
    # One numbering of patients in both parts: 13 has an eye in each.
    assert dataset.train.groups.tolist() == [0, 0, 1]
    assert dataset.test.groups.tolist() == [1, 2]
    (note,) = index_retinopathy(tmp_path).problems
    assert (note.kind, note.error) == ("leak", False)
    assert "got 1 with eyes in both the training and the test part, such as 13" in note.message


def test_kaggles_file_in_any_order_of_columns_with_suffixes_and_blanks(tmp_path: Path) -> None:
    touch(tmp_path / "train", *(f"{name}.jpeg" for name in NAMES), "99_left.jpeg")
    rows = [f"{grade}, {name}.jpeg,x" for name, grade in zip(NAMES, GRADES, strict=True)]
    (tmp_path / "trainLabels.csv").write_bytes("\ufefflevel,Image,note\r\n".encode())
    with (tmp_path / "trainLabels.csv").open("a") as file:
        file.write("\r\n\r\n".join(rows))
    dataset = load_retinopathy(tmp_path, test_share=0.4)
    both = {**dict(zip(dataset.train.paths, dataset.train.labels.tolist(), strict=True))}
    both |= dict(zip(dataset.test.paths, dataset.test.labels.tolist(), strict=True))
    assert {path.stem: label for path, label in both.items()} == dict(
        zip(NAMES, GRADES, strict=True)
    )
    assert not set(dataset.train.groups.tolist()) & set(dataset.test.groups.tolist())
    (note,) = index_retinopathy(tmp_path).problems
    assert (note.kind, note.path.name, note.error) == ("orphan", "99_left.jpeg", False)


def test_kaggles_test_labels_are_the_test_part(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.jpeg" for name in NAMES))
    write_lines(tmp_path / "trainLabels.csv", "image,level", "10_left,0", "10_right,2")
    write_lines(tmp_path / "retinopathy_solution.csv", "image,level,Usage", "13_left,1,Private")
    dataset = load_retinopathy(tmp_path)
    assert (len(dataset.train), dataset.test.labels.tolist()) == (2, [1])


def test_the_split_is_by_patients_and_by_seed(tmp_path: Path) -> None:
    names = [f"{patient}_{eye}" for patient in range(200) for eye in ("left", "right")]
    touch(tmp_path, *(f"{name}.jpeg" for name in names))
    rows = [f"{name},{0 if index % 4 else 2}" for index, name in enumerate(names)]
    write_lines(tmp_path / "trainLabels.csv", "image,level", *rows)
    first, same, other = (load_retinopathy(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.test)) == (320, 80)
    assert torch.bincount(first.test.labels).tolist() == [60, 0, 20]
    assert not set(first.train.groups.tolist()) & set(first.test.groups.tolist())
    assert first.test.paths == same.test.paths != other.test.paths
    assert load_retinopathy(tmp_path, test_share=0).test is None


def test_every_problem_is_listed_with_its_row(tmp_path: Path) -> None:
    touch(tmp_path / "a", "10_left.jpeg", "10_right.jpeg", "13_left.jpeg", "13_right.jpeg")
    touch(tmp_path / "b", "13_right.png")
    write_lines(
        tmp_path / "trainLabels.csv",
        "image,level",
        "10_left,5",
        "10_right,mild",
        "13_left",
        "13_right,0",
        "10_left,0",
        "15_left,1",
        ",3",
    )
    assert problems(tmp_path) == [
        "trainLabels.csv:4: expected 2 columns, got 1",
        "trainLabels.csv:2: expected a grade in 0..4, got '5'",
        "trainLabels.csv:3: expected a grade in 0..4, got 'mild'",
        f"trainLabels.csv:5: expected one image of 13_right, got {tmp_path}/a/13_right.jpeg, "
        f"{tmp_path}/b/13_right.png",
        "trainLabels.csv:6: expected each image once, got 10_left again, as in "
        f"{tmp_path}/trainLabels.csv:2",
        f"trainLabels.csv:7: expected the image {tmp_path}/a/15_left.jpeg, got no such file",
        "trainLabels.csv:8: expected a name, got none",
    ]


def test_missing_images_can_be_allowed(tmp_path: Path) -> None:
    touch(tmp_path, "10_left.jpeg")
    write_columns(tmp_path, "train", ["10_left", "10_right"], [0, 1])
    assert problems(tmp_path) == [
        f"train_img.csv:2: expected the image {tmp_path}/10_right.jpeg, got no such file"
    ]
    dataset = load_retinopathy(tmp_path, allow_missing=True, test_share=0)
    assert [path.name for path in dataset.train.paths] == ["10_left.jpeg", "10_right.jpeg"]


def test_images_elsewhere(tmp_path: Path) -> None:
    for folder in ("train", "train_512"):
        touch(tmp_path / folder, "10_left.jpeg")
    write_lines(tmp_path / "trainLabels.csv", "image,level", "10_left,0")
    with pytest.raises(DatasetError, match=r"expected one image of 10_left, got .*train_512"):
        load_retinopathy(tmp_path)
    dataset = load_retinopathy(tmp_path, images=tmp_path / "train_512", test_share=0)
    assert dataset.train.paths == (tmp_path / "train_512" / "10_left.jpeg",)


@pytest.mark.parametrize(
    ("names", "grades", "expected"),
    [
        (["10_left"], [0, 1], "train_label.csv: expected 1 grades, one for each name in"),
        (["10_left,3"], [0], "train_img.csv:1: expected one column, got 2"),
        ([], [0], "train_img.csv: expected rows, got an empty file"),
        (["10_left", "10_right"], ["x", 0], "train_label.csv:1: expected a grade in 0..4, got 'x'"),
        (["10_left"], ["-1"], "train_label.csv:1: expected a grade in 0..4, got '-1'"),
        (["13_left", "10_left"], [0, 1], "train_img.csv:1: expected the image"),
    ],
)
def test_columns_that_do_not_fit(
    tmp_path: Path, names: list[str], grades: list[object], expected: str
) -> None:
    touch(tmp_path, "10_left.jpeg", "10_right.jpeg")
    write_columns(tmp_path, "train", names, grades)
    assert any(problem.startswith(expected) for problem in problems(tmp_path))


def test_files_of_labels_that_are_missing_or_unreadable(tmp_path: Path) -> None:
    write_lines(tmp_path / "train_img.csv", "10_left")
    assert problems(tmp_path) == ["train_label.csv: expected this file, got none"]
    write_lines(tmp_path / "trainLabels.csv", "10_left,0")
    (problem,) = problems(tmp_path)
    assert "expected a header with the columns image and level, got '10_left,0'" in problem
    (tmp_path / "trainLabels.csv").write_bytes(b"\xff\xfe\x00")
    (problem,) = problems(tmp_path)
    assert "expected comma-separated values in UTF-8" in problem


@pytest.mark.parametrize("test", [None, [2, 3]])
def test_written_images_are_read_back(tmp_path: Path, test: list[int] | None) -> None:
    ramp = np.linspace(0, 255, 24 * 32 * 3).reshape(24, 32, 3).astype(np.uint8)
    images = [ramp, ramp[::-1], ramp[:, :, :1], ramp[:, :, 0], ramp]
    write_retinopathy(images, GRADES, [10, 10, 13, 13, 15], tmp_path, test=test)
    dataset = load_retinopathy(tmp_path, test_share=0)
    if test is None:
        assert dataset.test is None
        assert dataset.train.labels.tolist() == list(GRADES)
        assert [path.stem for path in dataset.train.paths] == list(NAMES)
    else:
        assert dataset.train.labels.tolist() == [0, 2, 0]
        assert dataset.test.labels.tolist() == [1, 4]
    assert Image.open(dataset.train.paths[0]).size == (32, 24)
    pixels = decode(dataset.train.read(0))[..., :3]
    assert np.abs(pixels.astype(int) - ramp).max() < 12


@pytest.mark.parametrize(
    ("grades", "groups", "image", "message"),
    [
        ([0], None, np.zeros((4, 4), np.uint8), "a grade and a group for each of 3 images, got 1"),
        ([0, 0, 5], None, np.zeros((4, 4), np.uint8), r"grades in 0\.\.4, got 0\.\.5"),
        ([0] * 3, [7] * 3, np.zeros((4, 4), np.uint8), "at most two images of a patient"),
        ([0] * 3, None, np.zeros((4, 4)), "images as uint8 .* got float64"),
        ([0] * 3, None, np.zeros((4, 4, 2), np.uint8), r"got uint8 \[4, 4, 2\]"),
    ],
)
def test_writing_refuses_what_does_not_fit(
    tmp_path: Path, grades: list[int], groups: list[int] | None, image: np.ndarray, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        write_retinopathy([image] * 3, grades, groups, tmp_path)


def test_solar_cells_stand_in_for_eyes(tmp_path: Path) -> None:
    # Real photographs with four grades of damage; one in forty, or the test would take long.
    elpv = pytest.importorskip("elpv_dataset", reason="elpv-dataset is not installed")
    folder = Path(elpv.__file__).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()[::40]]
    images = [np.asarray(Image.open(folder / name)) for name, _, _ in rows]
    grades = [round(3 * float(damage)) for _, damage, _ in rows]
    write_retinopathy(images, grades, torch.arange(len(rows)) // 2, tmp_path)
    dataset = load_retinopathy(tmp_path)
    labels = torch.cat([part.labels for part in dataset.parts.values()])
    assert torch.bincount(labels).tolist() == np.bincount(grades).tolist()
    assert len(dataset.test) == pytest.approx(0.2 * len(images), abs=2)
