# SPDX-License-Identifier: Apache-2.0
"""``fastresnet dataset``: what each action prints, writes and returns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from PIL import Image

from fastresnet import cli
from fastresnet.cli import dataset
from fastresnet.data import open_dataset, write_retinopathy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    y, x = np.mgrid[:90, :120]
    images = [
        np.stack((2 * x, 2 * y, x + y + step), axis=2).clip(0, 255).astype(np.uint8)
        for step in range(0, 50, 5)
    ]
    write_retinopathy(images, [0, 1, 2, 3, 4] * 2, None, tmp_path / "data")
    return tmp_path / "data"


def test_check_of_a_sound_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dataset", "check", str(folder), "--full", "--threads", "2"]) == 0
    printed = capsys.readouterr()
    assert "(retinopathy layout): 10 training images, 10 files: 0 errors, 0 notes" in printed.out
    assert printed.err == ""


def test_check_lists_every_error_and_the_first_notes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(25):
        Image.new("L", (8, 8)).save(folder / "images" / f"orphan_{number:02}.jpeg")
    (folder / "images" / "3_left.jpeg").write_bytes(b"")
    with (folder / "trainLabels.csv").open("a") as file:
        file.writelines(f"{number}_left,9\n" for number in range(100, 130))
    assert cli.main(["dataset", "check", str(folder)]) == 1
    printed = capsys.readouterr().out
    # Both the file and the grade of each of the 30 rows are wrong, and one file is empty.
    assert printed.count("expected a grade in 0..4, got '9'") == 30
    assert printed.count("got no such file") == 30
    assert "3_left.jpeg: expected an image, got no bytes (listed in trainLabels.csv:5)" in printed
    assert printed.count("expected a label for this image, got none") == 20
    assert "and 5 more; --json lists them" in printed
    assert "61 errors, 25 notes" in printed

    assert cli.main(["dataset", "check", str(folder), "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert (values["errors"], values["notes"], len(values["problems"])) == (61, 25, 86)


def test_stats_prints_draws_and_gives_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "stats.png"
    assert cli.main(["dataset", "stats", str(folder), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["severe", "2", "20.00%", "1.0000"] in rows
    assert ["all", "10"] in rows
    assert "sizes: 10 of 120x90" in printed
    assert "mean and std of 10 training images" in printed
    assert matplotlib.image.imread(picture).std() > 0.01

    arguments = ["dataset", "stats", str(folder), "--sample", "4", "--json"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert cli.main([*arguments, "--threads", "1"]) == 0
    assert capsys.readouterr().out == first
    values = json.loads(first)
    assert values["sample"] == 4
    assert cli.main([*arguments, "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] != values["mean"]


def test_stats_takes_the_name_of_a_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dataset", "stats", "digits", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["parts"]["train"]["images"] == 1437
    assert len(values["mean"]) == 1


def test_prepare_makes_a_data_set_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["dataset", "prepare", str(folder), str(out), "--size", "40"]
    (folder / "images" / "3_left.jpeg").write_bytes(b"")
    assert cli.main(arguments) == 2
    assert "3_left.jpeg: expected an image, got no bytes" in capsys.readouterr().err
    assert cli.main([*arguments, "--on-error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "left out\n" in printed
    assert "9 images, 0 made now, 1 left out" in printed
    train = open_dataset(out, test_share=0).train
    assert len(train) == 9
    assert Image.open(train.paths[0]).size == (67, 50)
    assert cli.main([*arguments[:-1], "48"]) == 2
    assert "expected the settings it was begun with" in capsys.readouterr().err


def test_prepare_hands_its_options_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = {}

    def prepare(source: Path, out: Path, settings: object, **options: object) -> object:
        got.update(options, source=source, out=out, settings=settings)
        raise ValueError("enough")

    monkeypatch.setattr(dataset, "prepare_dataset", prepare)
    arguments = [
        *("dataset", "prepare", str(folder), str(tmp_path / "out"), "--crop-border", "--square"),
        *("--local-average", "--headroom", "1.5", "--layout", "retinopathy", "--threads", "3"),
    ]
    assert cli.main(arguments) == 2
    assert got == {
        "source": folder,
        "out": tmp_path / "out",
        "settings": dataset.PrepareSettings(
            size=512, headroom=1.5, crop_border=True, square=True, local_average=True
        ),
        "layout": "retinopathy",
        "on_error": "raise",
        "threads": 3,
        "progress": None,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "absent"], "expected a folder with a data set, got none at absent"),
        (["check", "."], "expected one of these layouts, got none"),
        (["check", ".", "--layout", "imagenet"], "invalid choice: 'imagenet'"),
        (["stats", "absent"], "expected one of digits, mnist"),
        (["stats", ".", "--sample", "0"], "expected at least 1, got 0"),
        (["prepare", ".", "out", "--headroom", "0"], "expected a headroom in 1..4, got 0"),
        ([], "required: ACTION"),
    ],
)
def test_bad_input_is_named_and_leaves_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["dataset", *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bar_is_drawn_on_terminals_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(["dataset", "check", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    assert "checking" in printed.err
    json.loads(printed.out)
