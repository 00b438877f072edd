# SPDX-License-Identifier: Apache-2.0
"""Runs beside each other: groups, differences, and tables that equal hand-computed ones."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from html_page import Page, assert_sound
from run_folders import events, write_run

from fastresnet.train.compare import (
    Spread,
    compare_runs,
    format_spread,
    write_comparison,
)
from fastresnet.train.config import ConfigError
from fastresnet.train.run_directory import read_run, write_failure, write_json
from fastresnet.train.sweep import variants

SECTIONS = {"results", "curves", "differences", "classes", "data"}
SPACE = "\N{NARROW NO-BREAK SPACE}"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    write_json(path, {**json.loads(path.read_text()), **values})


@pytest.fixture
def sweep(tmp_path: Path) -> list[Path]:
    """Two learning rates, two seeds each."""
    return [
        write_run(tmp_path / f"{lr}-{seed}", lr=lr, seed=seed, accuracy=accuracy)
        for lr, accuracy in ((0.1, 0.7), (0.05, 0.9))
        for seed in (3, 4)
    ]


def test_seeds_are_grouped_and_differences_found(sweep: list[Path]) -> None:
    comparison = compare_runs([read_run(folder) for folder in sweep])
    assert [group.label for group in comparison.groups] == ["optim.lr=0.1", "optim.lr=0.05"]
    assert [[run.name for run in group.runs] for group in comparison.groups] == [
        ["0.1-3", "0.1-4"],
        ["0.05-3", "0.05-4"],
    ]
    assert comparison.differences == {"optim.lr": (0.1, 0.05)}
    assert comparison.environment == {}
    assert comparison.leader is comparison.groups[1]
    assert comparison.same_test


def test_seeds_alone_go_by_their_recipe(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"seed={seed}", seed=seed) for seed in (0, 1)]
    (group,) = compare_runs([read_run(folder) for folder in folders]).groups
    assert group.label == group.runs[0].title
    (alone,) = compare_runs([read_run(folders[1])]).groups
    assert alone.label == "seed=1"


def test_tables_equal_hand_computed_ones(sweep: list[Path], tmp_path: Path) -> None:
    page = Page(write_comparison(tmp_path / "out", compare_runs([*map(read_run, sweep)])))
    assert_sound(page)
    assert set(page.sections) - {""} == SECTIONS
    accuracies = [events(folder, "test")[0]["accuracy"] for folder in sweep]
    best = [events(folder, "epoch")[-1]["val_accuracy"] for folder in sweep]

    for row, folder, accuracy, validation in zip(
        rows(tmp_path / "out" / "compare.csv"), sweep, accuracies, best, strict=True
    ):
        assert row["run"] == folder.name
        assert row["optim.lr"] == folder.name.partition("-")[0]
        assert row["seed"] == folder.name.partition("-")[2]
        assert float(row["test_accuracy"]) == accuracy
        assert float(row["val_accuracy"]) == validation
        assert (row["best_epoch"], row["state"], row["test_kappa"]) == ("3", "finished", "")

    (results,) = page.tables["results"]
    first = statistics.fmean(accuracies[:2])
    for cells, start in zip(results[1:], (0, 2), strict=True):
        mean = statistics.fmean(accuracies[start : start + 2])
        deviation = abs(accuracies[start] - accuracies[start + 1]) / 2**0.5
        chosen = statistics.fmean(best[start : start + 2])
        spread = abs(best[start] - best[start + 1]) / 2**0.5
        label = f"optim.lr={(0.1, 0.05)[start // 2]}"
        assert cells == [
            label,
            "2",
            f"{100 * chosen:.2f} ± {100 * spread:.2f}{SPACE}%",
            "3, 3",
            f"{100 * mean:.2f} ± {100 * deviation:.2f}{SPACE}%",
            f"{100 * (mean - first):+.1f}" if start else "\N{EN DASH}",
            "1002",
        ]

    recall: dict[str, list[float]] = {}
    for folder in sweep:
        for line in list(csv.reader((folder / "confusion.csv").open(newline="")))[1:]:
            counts = [int(value) for value in line[1:]]
            own = ("cat", "dog", "owl").index(line[0])
            recall.setdefault(line[0], []).append(counts[own] / sum(counts))
    (classes,) = page.tables["classes"]
    for row, cells in zip(rows(tmp_path / "out" / "compare_classes.csv"), classes[1:], strict=True):
        values = recall[row["class"]]
        low, high = statistics.fmean(values[:2]), statistics.fmean(values[2:])
        assert float(row["optim.lr=0.1"]) == pytest.approx(low, rel=1e-12)
        assert float(row["optim.lr=0.05"]) == pytest.approx(high, rel=1e-12)
        assert cells == [
            row["class"],
            f"{100 * low:.1f}{SPACE}%",
            f"{100 * high:.1f}{SPACE}% {100 * (high - low):+.1f}",
        ]
    assert matplotlib.image.imread(tmp_path / "out" / "compare.png").std() > 0.01


def test_a_spread_is_the_standard_deviation_of_the_sample() -> None:
    spread = Spread((0.5, 0.7, 0.9))
    assert spread.mean == pytest.approx(0.7)
    assert spread.deviation == pytest.approx(0.2)
    assert format_spread(spread, share=True) == f"70.00 ± 20.00{SPACE}%"
    assert format_spread(spread, share=False) == "0.7000 ± 0.2000"
    assert format_spread(Spread((0.0, 0.0)), share=True) == f"0.00 ± 0.00{SPACE}%"
    assert format_spread(Spread((0.0,)), share=False) == "0.0000"
    assert format_spread(Spread(()), share=True) == "\N{EN DASH}"


def test_grades_are_ranked_by_kappa(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", lr=0.1, accuracy=0.6, ordinal=True),
        write_run(tmp_path / "b", lr=0.2, accuracy=0.9, ordinal=True),
    ]
    # The lower accuracy with the higher kappa.
    metrics = folders[0] / "metrics.jsonl"
    (test,) = events(folders[0], "test")
    metrics.write_text(metrics.read_text().replace(f'"kappa": {test["kappa"]}', '"kappa": 0.999'))
    comparison = compare_runs([*map(read_run, folders)])
    assert comparison.leader is comparison.groups[0]
    page = Page(write_comparison(tmp_path / "out", comparison))
    assert "0.9990" in page.sections["results"]
    assert len(page.of("figure")) == 6


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    change(two, "config.json", model={"name": "resnet50"}, ema=0.99)
    change(two, "environment.json", machine={"gpu": ["H100"]})
    comparison = compare_runs([read_run(one), read_run(two)])
    assert comparison.differences == {
        "model.name": ("resnet18", "resnet50"),
        "ema": (None, 0.99),
    }
    assert comparison.environment == {"machine.gpu": ([], ["H100"])}
    assert comparison.groups[1].label == "model.name=resnet50, ema=0.99"
    settings, environment = Page(write_comparison(tmp_path / "out", comparison)).tables[
        "differences"
    ]
    assert [row[0] for row in settings] == ["setting", "model.name", "ema"]
    assert [row[0] for row in environment] == ["environment", "machine.gpu"]


def test_other_recipes_go_by_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, name=f"recipe-{name}") for name in ("one", "two")]
    comparison = compare_runs([*map(read_run, folders)])
    assert [group.label for group in comparison.groups] == ["one", "two"]
    assert comparison.title == "recipe-one and recipe-two"


@pytest.mark.parametrize("other", [{"images": 200}, {"dataset": "park"}, {"classes": ("a", "b")}])
def test_other_test_images_are_said(tmp_path: Path, other: dict[str, Any]) -> None:
    folders = [write_run(tmp_path / "one"), write_run(tmp_path / "two", **other)]
    comparison = compare_runs([*map(read_run, folders)])
    assert not comparison.same_test
    page = Page(write_comparison(tmp_path / "out", comparison))
    assert "not all tested on the same images" in page.sections["results"]


def test_unfinished_and_failed_runs_are_said(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", lr=0.1)
    begun = write_run(tmp_path / "begun", lr=0.2)
    for name in ("summary.json", "confusion.csv", "predictions.npz"):
        (begun / name).unlink()
    lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text("".join(lines[:2]))
    failed = tmp_path / "failed"
    write_failure(failed, FloatingPointError("the loss is nan"))
    comparison = compare_runs([read_run(folder) for folder in (done, begun, failed)])
    page = Page(write_comparison(tmp_path / "out", comparison))
    assert_sound(page)
    assert "begun is not finished" in page.sections["results"]
    assert "failed failed: the loss is nan" in page.sections["results"]
    states = [row["state"] for row in rows(tmp_path / "out" / "compare.csv")]
    assert states == ["finished", "unfinished", "failed"]


def test_runs_without_any_epoch(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"name": "recipe"})
    page = Page(write_comparison(tmp_path / "out", compare_runs([read_run(tmp_path)])))
    assert_sound(page)
    assert set(page.sections) - {""} == SECTIONS
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.csv", "compare.html"}


def test_strings_are_escaped(tmp_path: Path) -> None:
    nasty = "<b>&\"'{{ 1 }}</script>"
    folders = [
        write_run(tmp_path / f"{lr}<i>", name=nasty, lr=lr, classes=(nasty, "b"), dataset=nasty)
        for lr in (1, 2)
    ]
    change(folders[0], "config.json", model={"name": nasty})
    page = Page(write_comparison(tmp_path / "out", compare_runs([*map(read_run, folders)])))
    assert_sound(page)
    assert nasty not in page.source
    assert not page.of("b")
    assert len(page.of("script")) == 1
    for section in ("results", "differences", "classes", "data"):
        assert nasty in page.sections[section], section


def test_variants_are_all_combinations() -> None:
    made = variants(["optim.lr=0.1,0.05", "schedule.sizes=(16,32),(32)"], seeds=[7, 8])
    assert [variant.overrides for variant in made] == [
        (f"optim.lr={lr}", f"schedule.sizes={sizes}", f"seed={seed}")
        for lr in ("0.1", "0.05")
        for sizes in ("(16,32)", "(32)")
        for seed in (7, 8)
    ]
    assert len({variant.folder for variant in made}) == 8
    assert made[0].folder == "optim.lr=0.1,schedule.sizes=(16,32),seed=7"
    (path,) = variants(["model.pretrained=a/b c.pt"], seeds=[0])
    assert path.overrides == ("model.pretrained=a/b c.pt",)
    assert "/" not in path.folder


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["optim.lr"], "expected NAME=VALUE,VALUE"),
        (["optim.lr=0.1,,0.2"], "expected NAME=VALUE,VALUE"),
        (["=1,2"], "expected NAME=VALUE,VALUE"),
        (["optim.lr=0.1,0.1"], "expected different values"),
        (["optim.lr=0.1", "optim.lr=0.2"], "expected each setting once, got 'optim.lr' twice"),
        (["seed=1,2"], "got 'seed' twice .which --seeds varies"),
    ],
)
def test_bad_variations_are_named(vary: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variants(vary, seeds=[0, 1])
