# SPDX-License-Identifier: Apache-2.0
"""``fastresnet compare``: of runs that are there, and of runs that it trains; training is made up
here, and real in the slow test."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import pytest
from run_folders import write_run

from fastresnet import cli
from fastresnet.cli import train
from fastresnet.train import RECIPES, apply_overrides

SWEEP = ["compare", "digits", "--vary", "optim.lr=0.1,0.05", "--output", "out"]


class Training:
    """Stands for the command that trains: notes what it is asked, and writes a run."""

    def __init__(self) -> None:
        self.commands: list[argparse.Namespace] = []
        self.outcomes: dict[str, int | Exception] = {}  # of runs by the name of their folder

    def run(self, arguments: argparse.Namespace) -> int:
        self.commands.append(arguments)
        outcome = self.outcomes.get(arguments.output.name, 0)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome:
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / "environment.json").write_text("{}")
            return outcome
        recipe = apply_overrides(RECIPES[arguments.recipe](), arguments.overrides)
        for path in arguments.output.glob("*"):
            path.unlink()
        if arguments.output.exists():
            arguments.output.rmdir()
        write_run(arguments.output, name=recipe.name, lr=recipe.optim.lr, seed=recipe.seed)
        return 0

    @property
    def names(self) -> list[str]:
        return [command.output.name for command in self.commands]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Training:
    monkeypatch.chdir(tmp_path)
    training = Training()
    monkeypatch.setattr(train, "run", training.run)
    return training


def states(folder: Path) -> list[tuple[str, str]]:
    with (folder / "compare.csv").open(newline="") as file:
        return [(row["run"], row["state"]) for row in csv.DictReader(file)]


def test_runs_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, accuracy in (("one", 0.7), ("two", 0.9)):
        write_run(tmp_path / name, name=f"recipe-{name}", accuracy=accuracy)
    assert cli.main(["compare", "one", "two", "--output", "out"]) == 0
    printed = capsys.readouterr().out
    assert "out/compare.html" in printed
    for name in ("one", "two"):
        (line,) = (line for line in printed.splitlines() if line.split()[:1] == [name])
        metrics = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        (test,) = (row for row in map(json.loads, metrics) if row["event"] == "test")
        assert f"{100 * test['accuracy']:.2f}" in line
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.html",
        "compare.png",
        "compare.csv",
        "compare_classes.csv",
    }


def test_a_sweep_trains_every_combination(training: Training) -> None:
    options = ["--seeds", "2", "--set", "schedule.epochs=3", "--set", "seed=5", "--threads", "1"]
    assert cli.main([*SWEEP, *options, "--data", "sets"]) == 0
    assert training.names == [
        f"optim.lr={lr},seed={seed}" for lr in ("0.1", "0.05") for seed in (5, 6)
    ]
    first = training.commands[0]
    assert (first.recipe, first.threads, first.data) == ("digits", 1, Path("sets"))
    assert not first.resume
    # What is varied comes behind what is set.
    assert first.overrides == ["schedule.epochs=3", "seed=5", "optim.lr=0.1", "seed=5"]
    assert states(Path("out")) == [(name, "finished") for name in training.names]
    page = Path("out/compare.html").read_text()
    assert "mean" in page


def test_what_is_finished_is_not_repeated(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(SWEEP) == 0
    assert len(training.commands) == 2
    assert cli.main(SWEEP) == 0
    assert len(training.commands) == 2
    assert capsys.readouterr().out.count("finished before") == 2
    # One more value, and the comparison grows.
    assert cli.main([*SWEEP[:3], "optim.lr=0.1,0.05,0.02", *SWEEP[4:]]) == 0
    assert training.names[2:] == ["optim.lr=0.02"]
    assert len(states(Path("out"))) == 3


def test_an_interrupted_sweep_goes_on(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.outcomes["optim.lr=0.05"] = 130
    assert cli.main(SWEEP) == 130
    assert "give the same command again" in capsys.readouterr().out
    assert not Path("out/compare.html").exists()
    # Stopped before it was a run: from the start.
    assert cli.main(SWEEP) == 130
    assert not training.commands[-1].resume
    # Stopped as one: from there.
    Path("out/optim.lr=0.05/config.json").write_text("{}")
    training.outcomes.clear()
    assert cli.main(SWEEP) == 0
    assert training.names == ["optim.lr=0.1"] + 3 * ["optim.lr=0.05"]
    assert training.commands[-1].resume
    assert [state for _, state in states(Path("out"))] == ["finished", "finished"]


def test_a_run_that_diverges_is_shown_and_not_repeated(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.outcomes["optim.lr=0.1"] = FloatingPointError("the loss is nan")
    assert cli.main(SWEEP) == 0
    assert states(Path("out")) == [("optim.lr=0.1", "failed"), ("optim.lr=0.05", "finished")]
    assert "the loss is nan" in Path("out/compare.html").read_text()
    assert cli.main(SWEEP) == 0
    assert training.names == ["optim.lr=0.1", "optim.lr=0.05"]
    assert "the loss is nan" in capsys.readouterr().out


def test_other_settings_need_another_folder(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(SWEEP) == 0
    for other in (["--set", "schedule.epochs=3"], ["--data", "elsewhere"]):
        assert cli.main([*SWEEP, *other]) == 2
        message = "expected the recipe, --set and --data of out/plan.json"
        assert message in capsys.readouterr().err
    assert len(training.commands) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "expected the folder of a run, with config.json, got nowhere"),
        (["digits"], "expected the folder of a run, with config.json, got digits"),
        (["digits", "fashion-mnist", "--seeds", "2"], "expected one recipe of digits"),
        (["nowhere", "--seeds", "2"], "got nowhere"),
        (["digits", "--seeds", "0"], "expected at least 1, got 0"),
        (["digits", "--vary", "optim.rate=1,2"], "no setting 'optim.rate'; there are: "),
        (["digits", "--vary", "optim.lr=0.1,fast"], "optim.lr: expected a finite number"),
        (["digits", "--vary", "optim.lr"], "--vary: expected NAME=VALUE"),
        (["run", "--set", "seed=1"], "--set: expected --vary or --seeds with it"),
        (["run", "--threads", "1"], "--threads: expected --vary or --seeds with it"),
        ([], "the following arguments are required"),
    ],
)
def test_bad_input_is_named_and_leaves_status_2(
    arguments: list[str],
    message: str,
    training: Training,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status = cli.main(["compare", *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert training.commands == []
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(
    training: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(SWEEP) == 2
    assert "expected one process to train in, got 2" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(
    training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert cli.main(SWEEP) == 2
    assert "expected a new or empty folder, got out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_a_real_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        *("--set", "schedule.epochs=1"),
        *("--set", "schedule.sizes=16"),
        *("--set", "timed_steps=0"),
    ]
    assert cli.main([*SWEEP, *options]) == 0
    assert states(Path("out")) == [("optim.lr=0.1", "finished"), ("optim.lr=0.05", "finished")]
    assert Path("out/optim.lr=0.1/report.html").is_file()
