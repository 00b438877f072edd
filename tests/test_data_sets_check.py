# SPDX-License-Identifier: Apache-2.0
"""Checking a data set: every kind of fault is found, placed, and told from what does no harm."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastresnet.data import (
    DatasetError,
    ImageDataset,
    ImageSet,
    open_dataset,
    write_cifar10,
    write_mnist_m,
    write_retinopathy,
)
from fastresnet.data.check import CheckReport, check_dataset
from fastresnet.data.decode import ImageError, decode
from fastresnet.data.parallel import map_in_order

pytest.importorskip("simplejpeg", reason="only libjpeg's warnings tell of damage within a file")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten photographs of one patient an eye, grades 0 to 4, nothing wrong with them."""
    from sklearn.datasets import load_sample_images

    photograph = load_sample_images().images[0]
    images = [photograph[y : y + 96, :160] for y in range(0, 320, 32)]
    write_retinopathy(images, [0, 1, 2, 3, 4] * 2, None, tmp_path / "data")
    return tmp_path / "data"


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rot(content: bytes) -> bytes:
    """Flips bits in the middle of a JPEG's scan until libjpeg notices."""
    for position in range(len(content) // 2, len(content) - 50, 7):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        try:
            decode(bytes(damaged))
        except ImageError:
            return bytes(damaged)
    raise AssertionError("no damage that libjpeg notices")


def found(report: CheckReport) -> dict[str, tuple[str, bool]]:
    """Kind and severity of the problem of each file."""
    return {problem.path.name: (problem.kind, problem.error) for problem in report.problems}


@pytest.mark.parametrize("full", [False, True])
def test_a_sound_set_has_no_problems(folder: Path, full: bool) -> None:
    calls = []
    report = check_dataset(folder, full=full, progress=lambda *call: calls.append(call))
    assert report.problems == ()
    assert (report.layout, report.images, report.files) == ("retinopathy", {"train": 10}, 10)
    assert calls == [(done, 10) for done in range(1, 11)]


DAMAGE: list[tuple[str, bool, Callable[[bytes], bytes]]] = [
    ("empty", True, lambda content: b""),
    ("not an image", True, lambda content: b"<html>404</html>"),
    ("truncated", True, lambda content: content[: len(content) // 2]),
    ("unsupported", True, lambda content: b"\0\0\0\x0cjP  \r\n\x87\n" + content),
    ("odd", False, lambda content: encoded(Image.new("CMYK", (64, 48)))),
    ("odd", False, lambda content: encoded(Image.new("RGB", (64, 48)), "PNG")),
    ("odd", False, lambda content: encoded(Image.new("RGB", (64, 48)), exif=b"Exif\0\0" + EXIF)),
]
EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("kind", "error", "damage"), DAMAGE)
def test_a_fault_of_a_file_is_named_with_its_row(
    folder: Path, kind: str, error: bool, damage: Callable[[bytes], bytes], full: bool
) -> None:
    path = folder / "images" / "3_left.jpeg"
    path.write_bytes(damage(path.read_bytes()))
    report = check_dataset(folder, full=full)
    assert found(report) == {"3_left.jpeg": (kind, error)}
    (problem,) = report.problems
    assert ("(listed in trainLabels.csv:5)" in str(problem)) == error


def test_what_is_odd_is_said() -> None:
    # The three odd files above differ in what they say.
    assert len({damage(b"") for kind, _, damage in DAMAGE if kind == "odd"}) == 3


def test_oddities_say_what_becomes_of_them(folder: Path) -> None:
    contents = [
        encoded(Image.new("CMYK", (64, 48))),
        encoded(Image.new("I;16", (64, 48)), "PNG"),
        encoded(Image.new("RGB", (64, 48)), exif=b"Exif\0\0" + EXIF),
    ]
    for number, content in enumerate(contents):
        (folder / "images" / f"{number}_left.jpeg").write_bytes(content)
    report = check_dataset(folder)
    assert report.errors == ()
    assert [problem.message for problem in report.notes] == [
        "expected RGB or grey of 8 bits, got CMYK: it is converted",
        "expected RGB or grey of 8 bits, got I;16: it is converted",
        "expected jpeg by its name, got png: it is read as that",
        "expected an upright image, got EXIF orientation 6: it is turned",
    ]


def test_damage_within_a_file_needs_the_full_check(folder: Path) -> None:
    path = folder / "images" / "4_left.jpeg"
    path.write_bytes(rot(path.read_bytes()))
    assert check_dataset(folder).problems == ()
    assert found(check_dataset(folder, full=True)) == {"4_left.jpeg": ("corrupt", True)}


def test_labels_files_and_orphans_together(folder: Path) -> None:
    lines = (folder / "trainLabels.csv").read_text().splitlines()
    lines[2] = "1_left,7"
    lines[4] = "4_left,0"
    (folder / "trainLabels.csv").write_text("\n".join([*lines, "99_left,0"]) + "\n")
    (folder / "images" / "1_left.jpeg").write_bytes(b"")
    (folder / "images" / "50_left.jpeg").write_bytes(b"GIF")
    report = check_dataset(folder)
    got = [
        (problem.path.name, problem.row, problem.kind, problem.error) for problem in report.problems
    ]
    assert got == [
        ("trainLabels.csv", 3, "label", True),
        ("trainLabels.csv", 6, "duplicate", True),
        ("trainLabels.csv", 12, "missing", True),
        ("3_left.jpeg", None, "orphan", False),
        ("50_left.jpeg", None, "orphan", False),
        ("1_left.jpeg", None, "empty", True),
        ("50_left.jpeg", None, "not an image", False),  # nothing trains on it
    ]
    values = json.loads(json.dumps(report.to_dict()))
    assert (values["errors"], values["notes"], values["files"]) == (4, 3, 11)
    assert values["problems"][0] == {
        "kind": "label",
        "error": True,
        "path": str(folder / "trainLabels.csv"),
        "row": 3,
        "message": "expected a grade in 0..4, got '7'",
    }


def test_equal_files_are_noted_by_the_full_check(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    images[5] = images[0]
    images[6] = images[1]
    write_retinopathy(images, [0, 1, 2, 3, 4, 3, 1], None, tmp_path, test=[6])
    assert check_dataset(tmp_path).problems == ()
    notes = check_dataset(tmp_path, full=True).notes
    assert [(note.kind, note.path.stem) for note in notes] == [
        ("duplicate", "5_left"),
        ("leak", "6_left"),
    ]
    assert notes[0].message.endswith("labels 3 (train) and 0 (train)")
    assert notes[1].message.endswith("labels 1 (test) and 1 (train)")


def test_classes_without_images_are_noted(tmp_path: Path) -> None:
    write_retinopathy([np.zeros((9, 9), np.uint8)] * 2, [0, 3], None, tmp_path)
    notes = check_dataset(tmp_path).notes
    assert [note.message for note in notes] == [
        f"expected training images of class {name}, got none"
        for name in ("mild", "moderate", "proliferative DR")
    ]


def small_dataset(size: int = 32) -> ImageDataset:
    images = torch.randint(0, 256, (20, size, size, 3), generator=torch.Generator().manual_seed(0))
    part = ImageSet(images.to(torch.uint8), torch.arange(20) % 10)
    return ImageDataset("small", part, part, tuple(map(str, range(10))), "here")


def test_sets_in_memory_are_read(tmp_path: Path) -> None:
    folder = write_cifar10(small_dataset(), tmp_path)
    report = check_dataset(tmp_path)
    assert (report.problems, report.files) == ((), 0)
    assert report.images == {"train": 20, "test": 20}
    for name in ("data_batch_1", "batches.meta"):
        (folder / name).write_bytes(b"")
    report = check_dataset(tmp_path)
    assert sorted(found(report)) == ["batches.meta", "data_batch_1"]
    assert len(report.errors) == 2


def test_images_of_different_sizes_where_all_must_be_alike(tmp_path: Path) -> None:
    write_mnist_m(small_dataset(), tmp_path)
    assert check_dataset(tmp_path, full=True).errors == ()
    Image.new("RGB", (31, 31)).save(tmp_path / "mnist_m_train" / "00000007.png")
    (error,) = check_dataset(tmp_path, full=True).errors
    assert (error.kind, error.path.name) == ("odd", "00000007.png")


def test_an_unknown_layout_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected one of these layouts, got none"):
        check_dataset(tmp_path)


def test_a_set_passes_exactly_if_all_of_it_can_be_read(folder: Path) -> None:
    random = np.random.default_rng(0)
    path = folder / "images" / "2_left.jpeg"
    sound = path.read_bytes()
    verdicts = set()
    for _ in range(60):
        damaged = bytearray(sound)
        for position in random.integers(0, len(damaged), random.integers(0, 4)):
            damaged[position] ^= 1 << random.integers(8)
        cut = random.integers(len(damaged) // 2, 2 * len(damaged))
        path.write_bytes(damaged[:cut])
        report = check_dataset(folder, full=True)
        train = open_dataset(folder, test_share=0).train
        readable = True
        for index in range(len(train)):
            try:
                decode(train.read(index))
            except ImageError:
                readable = False
        assert (not report.errors) == readable
        verdicts.add(readable)
    assert verdicts == {True, False}


def test_work_in_threads_keeps_order_and_runs_little_ahead() -> None:
    begun = []

    def square(number: int) -> int:
        begun.append(number)
        time.sleep(0.001 * (number % 3))
        return number * number

    results = map_in_order(square, iter(range(100)), threads=3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(begun) < 40
    assert list(results) == [number * number for number in range(5, 100)]
    assert list(map_in_order(square, [])) == []


def test_work_in_threads_passes_errors_on_and_ends() -> None:
    before = threading.active_count()

    def fail(number: int) -> int:
        if number == 7:
            raise OSError("seven")
        return number

    results = map_in_order(fail, range(1000), threads=2)
    with pytest.raises(OSError, match="seven"):
        list(results)
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="expected at least 1 thread, got 0"):
        list(map_in_order(fail, range(2), threads=0))
