# SPDX-License-Identifier: Apache-2.0
"""Folders of classes, and the CSV files that list images, classes and parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from fastresnet.data import (
    DatasetError,
    ImageSet,
    load_image_csv,
    load_image_folder,
    open_dataset,
    write_image_csv,
)
from fastresnet.data.datasets.image_csv import index_image_csv
from fastresnet.data.datasets.image_folder import index_image_folder

CLASSES = ("Adonis", "an 88", "Zebra longwing")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_parts(folder: Path, counts: dict[str, int]) -> None:
    for part, count in counts.items():
        for name in CLASSES:
            touch(folder, *(f"{part}/{name}/{number}.jpg" for number in range(count)))


@pytest.mark.parametrize("validation", ["valid", "val", "Validation"])
def test_parts_with_a_folder_a_class(tmp_path: Path, validation: str) -> None:
    write_parts(tmp_path, {"train": 4, validation: 2, "test": 1})
    touch(tmp_path, "train/Adonis/deep/er.PNG", "train/Adonis/.hidden.jpg")
    dataset = load_image_folder(tmp_path)
    assert dataset.classes == tuple(sorted(CLASSES))
    assert torch.bincount(dataset.train.labels).tolist() == [5, 4, 4]
    assert torch.bincount(dataset.validation.labels).tolist() == [2, 2, 2]
    assert torch.bincount(dataset.test.labels).tolist() == [1, 1, 1]
    assert dataset.train.groups is None
    # torchvision numbers and finds the same.
    theirs = ImageFolder(str(tmp_path / "train"), is_valid_file=lambda path: "hidden" not in path)
    assert theirs.classes == list(dataset.classes)
    ours = zip(map(str, dataset.train.paths), dataset.train.labels.tolist(), strict=True)
    assert sorted(theirs.samples) == sorted(ours)


def test_folders_of_classes_are_split_by_seed(tmp_path: Path) -> None:
    for name in CLASSES:
        touch(tmp_path, *(f"{name}/{number}.jpg" for number in range(10)))
    first, other = (load_image_folder(tmp_path, test_share=0.3, seed=seed) for seed in (0, 1))
    assert torch.bincount(first.train.labels).tolist() == [7, 7, 7]
    assert torch.bincount(first.test.labels).tolist() == [3, 3, 3]
    assert first.test.paths != other.test.paths
    assert not set(first.train.paths) & set(first.test.paths)


def test_labels_are_those_of_the_training_part(tmp_path: Path) -> None:
    # torchvision's two ImageFolders would call the test part's only class number 0.
    write_parts(tmp_path, {"train": 1})
    touch(tmp_path, "test/an 88/0.jpg")
    dataset = load_image_folder(tmp_path)
    assert dataset.classes[dataset.test.labels[0]] == "an 88"
    assert dataset.test.labels.tolist() == [2]


def test_problems_of_folders_are_listed(tmp_path: Path) -> None:
    write_parts(tmp_path, {"train": 1, "test": 1})
    (tmp_path / "train" / "empty").mkdir()
    touch(tmp_path, "test/Monarch/0.jpg", "train/Adonis/notes.txt", "train/loose.jpg")
    with pytest.raises(DatasetError) as error:
        load_image_folder(tmp_path)
    assert [str(problem).removeprefix(f"{tmp_path}/") for problem in error.value.problems] == [
        "train/empty: expected images of this class, got none",
        "test/Monarch: expected a class of the training part, got this folder",
    ]
    notes = [p for p in index_image_folder(tmp_path).problems if not p.error]
    assert {(note.kind, note.path.name) for note in notes} == {
        ("ignored", "notes.txt"),
        ("orphan", "loose.jpg"),
    }


def test_a_test_part_alone_is_an_error(tmp_path: Path) -> None:
    write_parts(tmp_path, {"test": 1})
    with pytest.raises(DatasetError, match="expected a folder train beside test, got none"):
        load_image_folder(tmp_path)


HEADER = "class id,filepaths,labels,data set,scientific name"


def write_csv(
    folder: Path, *rows: str, header: str = HEADER, name: str = "butterflies.csv"
) -> None:
    (folder / name).write_text("\n".join((header, *rows)) + "\n")


def test_a_csv_file_of_images_classes_and_parts(tmp_path: Path) -> None:
    write_parts(tmp_path, {"train": 2, "valid": 1, "test": 1})
    numbers = {"Zebra longwing": 0, "Adonis": 1, "an 88": 2}  # not alphabetical: the file decides
    rows = [
        f"{number}.0,{part}/{name}/{image}.jpg,{name},{part},Papilio"
        for part, count in (("train", 2), ("valid", 1), ("test", 1))
        for image in range(count)
        for name, number in numbers.items()
    ]
    rows[0] = rows[0].replace("/", "\\")
    write_csv(tmp_path, *rows)
    dataset = load_image_csv(tmp_path)
    assert dataset.classes == ("Zebra longwing", "Adonis", "an 88")
    assert torch.bincount(dataset.train.labels).tolist() == [2, 2, 2]
    for part in dataset.parts.values():
        for path, label in zip(part.paths, part.labels.tolist(), strict=True):
            assert path.is_file()
            assert path.parent.name == dataset.classes[label]
    assert (len(dataset.validation), len(dataset.test)) == (3, 3)
    assert index_image_csv(tmp_path).problems == []

    write_csv(tmp_path, *(row.partition(",")[2] for row in rows), header=HEADER.partition(",")[2])
    assert load_image_csv(tmp_path).classes == tuple(sorted(CLASSES))


def test_every_row_that_is_wrong_is_listed(tmp_path: Path) -> None:
    write_parts(tmp_path, {"train": 3})
    write_csv(
        tmp_path,
        "0,train/Adonis/0.jpg,Adonis,train,x",
        "1,train/an 88/0.jpg,an 88,train,x",
        "0,train/an 88/1.jpg,an 88,train,x",
        "1,train/Adonis/1.jpg,Adonis,holdout,x",
        "2,train/Adonis/2.jpg,Adonis,train,x",
        "0,train/Adonis/0.jpg,Adonis,test,x",
        "0,train/Adonis/9.jpg,Adonis,train,x",
        "0,../Adonis.jpg,Adonis,train,x",
        "0,/etc/Adonis.jpg,Adonis,train,x",
        "0,train/Adonis/1.jpg,Adonis",
        "0,train/an 88/2.jpg,,train,x",
    )
    with pytest.raises(DatasetError) as error:
        load_image_csv(tmp_path)
    got = {problem.row: problem.message for problem in error.value.problems}
    assert got == {
        4: "expected class id 1 for an 88, as before, got 0",
        5: "expected train, valid or test, got 'holdout'",
        6: "expected a class id in 0..1, got '2'",
        7: "expected each image once, got train/Adonis/0.jpg again, as in row 2",
        8: f"expected the image {tmp_path}/train/Adonis/9.jpg, got no such file",
        9: "expected a path within the folder, got '../Adonis.jpg'",
        10: "expected a path within the folder, got '/etc/Adonis.jpg'",
        11: "expected 5 columns, got 3",
        12: "expected the name of a class, got none",
    }
    assert {problem.path for problem in error.value.problems} == {tmp_path / "butterflies.csv"}


def test_two_lists_are_one_too_many(tmp_path: Path) -> None:
    touch(tmp_path, "train/Adonis/0.jpg")
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path, "0,train/Adonis/0.jpg,Adonis,train,x", name=name)
    with pytest.raises(DatasetError, match=r"expected one CSV file .* got a.csv, b.csv"):
        load_image_csv(tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_written_in_both_layouts(tmp_path: Path, channels: int) -> None:
    classes = ("T-shirt/top", "Coat", "Bag")
    shade = torch.arange(6, dtype=torch.uint8).mul(40)[:, None, None, None]
    images = shade.expand(6, 9, 12, channels).contiguous()
    whole = ImageSet(images, torch.tensor([0, 1, 2, 0, 1, 2]))
    parts = {"train": whole, "validation": whole.subset(torch.tensor([1])), "test": whole}
    write_image_csv(parts, classes, tmp_path)
    dataset = open_dataset(tmp_path)
    assert "image-csv" in dataset.source
    assert dataset.classes == classes
    for name, part in parts.items():
        assert dataset.parts[name].labels.tolist() == part.labels.tolist()
        for path, pixels in zip(dataset.parts[name].paths, part.images, strict=True):
            image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).int()
            assert image.shape == (9, 12, 3)
            assert (image - pixels.int()).abs().max() <= 1
    folders = load_image_folder(tmp_path)
    assert folders.classes == ("Bag", "Coat", "T-shirt-top")
    assert torch.bincount(folders.validation.labels, minlength=3).tolist() == [0, 1, 0]
    with pytest.raises(DatasetError, match=r"expected parts of train, validation, test, got 'val'"):
        write_image_csv({"val": whole}, classes, tmp_path)
    with pytest.raises(DatasetError, match=r"expected training labels in 0\.\.1, got 0\.\.2"):
        write_image_csv({"train": whole}, classes[:2], tmp_path)
