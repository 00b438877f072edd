# SPDX-License-Identifier: Apache-2.0
"""The report of a run: every section, the recorded numbers, nothing fetched, nothing unescaped."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from html_page import Page, assert_sound
from PIL import Image
from run_folders import add_events, events, write_run

from fastresnet.train import report
from fastresnet.train.confusion import write_confusion
from fastresnet.train.pages import duration, number, percent, text, thumbnail
from fastresnet.train.report import write_report
from fastresnet.train.run_directory import RunError, write_json

SECTIONS = {
    "result",
    "curves",
    "confusion",
    "classes",
    "mistakes",
    "speed",
    "data",
    "configuration",
    "environment",
}
PICTURES = {"curves.png", "learning_rate.png", "confusion.png", "recall.png"}
NASTY = "<b>&\"'{{ 1 }}</script>"


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """PNG files take most of a report's time, and are tested elsewhere."""
    monkeypatch.setattr(report, "write_plots", lambda run: None)


def picture(index: int) -> np.ndarray:
    return np.full((28, 28, 1), index % 256, dtype=np.uint8)


def test_a_whole_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", name="recipe", epochs=4)
    before = {path.name for path in folder.iterdir()}
    path = write_report(folder, image=picture)
    assert path == folder / "report.html"
    assert {file.name for file in folder.iterdir()} - before == {*PICTURES, "report.html"}
    for name in PICTURES:
        assert matplotlib.image.imread(folder / name).std() > 0.01
    page = Page(path)
    assert_sound(page)
    assert set(page.sections) - {""} == SECTIONS
    assert len(page.of("figure")) == 3  # loss, accuracy, learning rate
    assert "There is no" not in page.text
    assert "made up" in page.sections["data"]


@pytest.mark.usefixtures("no_plots")
def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", epochs=4)
    page = Page(write_report(folder))
    (test,) = events(folder, "test")
    with (folder / "confusion.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    counts = np.array([[int(value) for value in row[1:]] for row in rows])

    assert percent(test["accuracy"]) in page.sections["result"]
    assert number(test["loss"]) in page.sections["result"]
    majority = counts.sum(1).argmax()
    baseline = f"{percent(counts.sum(1)[majority] / counts.sum())} by always answering"
    assert f"{baseline} {header[1 + majority]}" in page.sections["result"]

    (epochs,) = page.tables["curves"]
    keys = [key.replace(" ", "_") for key in epochs[0]]
    for cells, row in zip(epochs[1:], events(folder, "epoch"), strict=True):
        expected = [(percent if key.endswith("accuracy") else number)(row[key]) for key in keys]
        assert cells == expected
        assert set(keys) == set(row) - {"event"}

    images, shares, mistakes = page.tables["confusion"]
    assert [[int(cell) for cell in row[1:]] for row in images[1:]] == counts.tolist()
    for cells, row in zip(shares[1:], counts, strict=True):
        assert cells[1:] == [f"{100 * value / row.sum():.1f}" for value in row]
    assert int(mistakes[1][2]) == (counts - np.diag(counts.diagonal())).max()

    (classes,) = page.tables["classes"]
    for row, cells in enumerate(classes[1:]):
        name, support, _, recall, precision, _, _ = cells
        assert (name, int(support)) == (header[1 + row], counts[row].sum())
        assert recall == percent(counts[row, row] / counts[row].sum(), 1)
        assert precision == percent(counts[row, row] / counts[:, row].sum(), 1)

    assert "40.0 ms" in page.sections["speed"]
    assert "1.25 times as fast" in page.sections["speed"]
    assert f"waiting for data {percent(0.05, 1)}" in page.sections["speed"]
    settings = {row[0]: row[1] for table in page.tables["configuration"] for row in table}
    assert (settings["lr"], settings["sizes"], settings["seed"]) == ("0.1", "16, 32", "0")
    facts = {row[0]: row[1] for table in page.tables["environment"] for row in table}
    assert facts == {"torch": "2.14", "gpu": "none"}


@pytest.mark.usefixtures("no_plots")
def test_a_step_whose_outputs_differ_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (timing,) = events(folder, "step_timing")
    assert "The outputs agree" in Page(write_report(folder)).sections["speed"]
    add_events(folder, {**timing, "outputs_agree": False})
    assert "THE OUTPUTS DIFFER" in Page(write_report(folder)).sections["speed"]


def test_the_headline_of_grades_is_kappa(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", classes=tuple("01234"), ordinal=True, regression=True)
    page = Page(write_report(folder, image=picture))
    assert_sound(page)
    (test,) = events(folder, "test")
    result = page.sections["result"]
    assert result.startswith(f"{test['kappa']:.3f} quadratic weighted kappa")
    assert percent(test["accuracy"]) in result
    assert len(page.of("figure")) == 4
    assert (folder / "kappa.png").is_file()
    assert "furthest from their grade" in page.sections["mistakes"]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("select", ["accuracy", "kappa", "loss"])
def test_the_best_epoch_says_what_chose_it(tmp_path: Path, select: str) -> None:
    folder = write_run(tmp_path / "run", classes=tuple("01234"), ordinal=True)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "evaluation": {"select": select}})
    (test,) = events(folder, "test")
    value = events(folder, "epoch")[test["epoch"] - 1][f"val_{select}"]
    said = percent(value) if select == "accuracy" else number(value)
    assert f"validation {select} {said}" in Page(write_report(folder)).sections["result"]


@pytest.mark.usefixtures("no_plots")
def test_a_class_without_test_images(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", classes=tuple("01234"))
    counts = torch.full((5, 5), 2)
    counts[4] = 0
    write_confusion(folder, counts, tuple("01234"))
    page = Page(write_report(folder))
    (classes,) = page.tables["classes"]
    assert classes[4][-1] == "0 (2)"
    assert classes[5][-1] == "no test images"


@pytest.mark.usefixtures("no_plots")
def test_the_loader_and_why_it_was_chosen(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    write_json(
        folder / "summary.json", {**summary, "loader": "native (the fastest for a CPU), 2 threads"}
    )
    speed = Page(write_report(folder)).sections["speed"]
    assert "loader native (the fastest for a CPU), 2 threads" in speed


@pytest.mark.usefixtures("no_plots")
def test_mistakes_are_shown_with_their_pixels(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", images=400, accuracy=0.7)
    page = Page(write_report(folder, image=picture))
    with np.load(folder / "predictions.npz") as file:
        probabilities, labels = file["probabilities"], file["labels"]
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    worst = wrong[np.argsort(-probabilities[wrong].max(1))][:24]
    assert f"Of {len(wrong)} images predicted wrong" in page.sections["mistakes"]
    shown = page.of("img")
    assert len(shown) == 24
    classes = ("cat", "dog", "owl")
    for image, index in zip(shown, worst, strict=True):
        true, predicted = classes[labels[index]], classes[probabilities[index].argmax()]
        assert image["alt"] == f"Test image {index}: {true}, taken for {predicted}"
        data = base64.b64decode(image["src"].partition(",")[2])
        assert np.array(Image.open(io.BytesIO(data)).convert("L")).mean() == index % 256


@pytest.mark.usefixtures("no_plots")
def test_without_mistakes(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", accuracy=1.1), image=picture))
    assert_sound(page)
    assert "every test image was predicted right" in page.sections["mistakes"]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("classes", [2, 30])
def test_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    names = [f"class {name}" for name in range(classes)]
    folder = write_run(tmp_path / "run", classes=names, images=20 * classes)
    page = Page(write_report(folder))
    assert_sound(page)
    assert len(page.tables["classes"][0]) == 1 + classes
    # Too many to be read as a table are a picture with a title for each cell.
    assert len(page.tables["confusion"]) == (3 if classes == 2 else 1)


@pytest.mark.usefixtures("no_plots")
def test_strings_are_escaped(tmp_path: Path) -> None:
    for classes in (2, 30):
        names = [f"{NASTY}{name}" for name in range(classes)]
        folder = write_run(
            tmp_path / f"{classes} <i>", name=NASTY, classes=names, dataset=NASTY, accuracy=0.5
        )
        page = Page(write_report(folder, image=picture))
        assert_sound(page)
        assert NASTY not in page.source
        assert not page.of("b") or all(element == {} for element in page.of("b"))
        assert len(page.of("script")) == 1
        for section in ("result", "classes", "mistakes", "data", "configuration"):
            assert NASTY in page.sections[section], section
        assert any(NASTY in image["alt"] for image in page.of("img"))


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("missing", "section", "note"),
    [
        ("confusion.csv", "confusion", "There is no confusion.csv"),
        ("confusion.csv", "classes", "There is no confusion.csv"),
        ("predictions.npz", "mistakes", "There is no predictions.npz"),
        ("metrics.jsonl", "curves", "No epoch has been trained yet"),
        ("metrics.jsonl", "result", "Not tested yet"),
        ("metrics.jsonl", "speed", "not timed"),
        ("config.json", "configuration", "There is no config.json"),
        ("environment.json", "environment", "There is no environment.json"),
        ("summary.json", "data", "Every figure of this page is from zoo"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, missing: str, section: str, note: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / missing).unlink()
    page = Page(write_report(folder, image=picture))
    assert_sound(page)
    assert set(page.sections) - {""} == SECTIONS
    assert note in page.sections[section]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    page = Page(write_report(folder))
    assert_sound(page)
    assert set(page.sections) - {""} == SECTIONS
    assert {path.name for path in folder.iterdir()} == {"config.json", "report.html"}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the folder of a run"):
        write_report(tmp_path)


@pytest.mark.parametrize("shape", [(300, 200, 3), (28, 28, 1), (28, 28), (10, 500, 3)])
def test_thumbnails(shape: tuple[int, ...]) -> None:
    pixels = np.full(shape, 200, dtype=np.uint8)
    kind, _, data = thumbnail(pixels).partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == ("data:image/png" if max(shape[:2]) <= 64 else "data:image/jpeg")
    height, width = shape[:2]
    scale = min(1, 192 / max(height, width))
    assert image.size == (round(width * scale), round(height * scale))
    assert abs(np.array(image, dtype=int) - 200).max() <= 1


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_what_is_no_image_is_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected an image, uint8"):
        thumbnail(pixels)


def test_forms_of_numbers() -> None:
    space = "\N{NARROW NO-BREAK SPACE}"
    assert percent(0.92254) == f"92.25{space}%"
    assert percent(None) == percent(math.nan) == number(math.nan) == "\N{EN DASH}"
    assert [number(value) for value in (0.123456, 12345.6, 10000, 3, "a")] == [
        "0.1235",
        "12,346",
        "10,000",
        "3",
        "a",
    ]
    assert [duration(value) for value in (0.25, 2.0, 59.4, 61, 3599, 3600, 7000)] == [
        "250 ms",
        "2.0 s",
        "59 s",
        "1 min 1 s",
        "59 min 59 s",
        "1 h 0 min",
        "1 h 56 min",
    ]
    assert [text(value) for value in (None, True, [1, 2], (), 0.1, 5e-4, "a")] == [
        "none",
        "true",
        "1, 2",
        "none",
        "0.1",
        "0.0005",
        "a",
    ]
