# SPDX-License-Identifier: Apache-2.0
"""The command line: a whole run on scikit-learn's digits, and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from fastresnet import cli, environment
from fastresnet.data.datasets import fashion_mnist

# Fashion-MNIST where no place has it and there is no network.
WITHOUT_FASHION_MNIST = """
import sys
from pathlib import Path
from fastresnet.cli import main
from fastresnet.data.datasets import fashion_mnist

def no_network(root):
    raise OSError("no network")

fashion_mnist.DEBIAN_FOLDER = Path("absent")
fashion_mnist._download = no_network
sys.exit(main(sys.argv[1:]))
"""
# At 4 px the last stage is a stride-2 3x3 convolution on one pixel, whose bfloat16 weight gradient
# oneDNN leaves partly unwritten (torch 2.14.1): a loss of nan now and then.
TINY = [
    *("--set", "schedule.epochs=2"),
    *("--set", "schedule.sizes=8,16"),
    *("--set", "augment.size=32"),
    *("--set", "timed_steps=1"),
    *("--set", "tensorboard=false"),
]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_whole_run_falls_back_to_digits_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "fashion-mnist", "--output", "run", "--threads", "1", *TINY]
    done = run("-c", WITHOUT_FASHION_MNIST, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (fallback,) = (line for line in lines if "handwritten digits instead" in line)
    assert "no network" in fallback
    epochs = [line for line in lines if line.startswith(("epoch 1/2  lr", "epoch 2/2  lr"))]
    assert len(epochs) == 2
    assert sum(line.startswith("test accuracy ") for line in lines) == 1
    (timing,) = (line for line in lines if line.startswith("training step, batch 64 at 16 px"))
    assert "DIFFER" not in timing

    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "best.safetensors",
        "config.json",
        "confusion.csv",
        "confusion.png",
        "confusion_normalised.csv",
        "curves.png",
        "environment.json",
        "last.pt",
        "learning_rate.png",
        "metrics.csv",
        "metrics.jsonl",
        "predictions.npz",
        "recall.png",
        "report.html",
        "summary.json",
    }
    for picture in ("curves.png", "confusion.png"):
        assert matplotlib.image.imread(folder / picture).std() > 0.01
    config = json.loads((folder / "config.json").read_text())
    assert (config["name"], config["schedule"]["sizes"]) == ("digits", [8, 16])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["dataset"] == "digits"
    assert summary["test_accuracy"] > 0.2  # chance is 0.1
    assert summary["threads"] == 1
    assert summary["test"]["majority"] < summary["test_accuracy"]
    assert len(summary["test"]["recall"]) == 10
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in metrics]
    assert events == ["epoch", "epoch", "test", "step_timing"]

    # The same command once more, in this process.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", Path("absent"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "_download", no_network)
    threads = torch.get_num_threads()
    try:
        assert cli.main(arguments) == 2
        assert "--output: expected a new or empty folder, got run" in capsys.readouterr().err

        assert cli.main([*arguments, "--resume", "--set", "optim.lr=0.01"]) == 2
        error = capsys.readouterr().err
        assert "--resume: expected the recipe and settings of run/config.json" in error

        # The best weights once more, from the folder and from the file by itself.
        evaluation = ["eval", "run", "--threads", "1", "--output", "evaluation"]
        assert cli.main(evaluation) == 0
        assert f"{summary['test_accuracy']:.2%} on 360 images" in capsys.readouterr().out
        facts = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
        assert facts["loss"] == pytest.approx(summary["test_loss"], rel=1e-4)
        assert matplotlib.image.imread(tmp_path / "evaluation" / "confusion.png").std() > 0.01
        assert cli.main(["eval", "run/best.safetensors", "--threads", "1"]) == 0
        assert cli.main(["eval", "run/last.pt"]) == 2
        assert "expected a safetensors file" in capsys.readouterr().err

        # Finished before: only the test, the report and the timing are left to do.
        assert cli.main([*arguments, "--resume"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "epoch 1/2" not in capsys.readouterr().out
    same = json.loads((folder / "summary.json").read_text())
    assert same["test_accuracy"] == summary["test_accuracy"]
    # The time in all is that of the epochs too, whichever process trained them.
    seconds = [row["seconds"] for row in map(json.loads, metrics) if row["event"] == "epoch"]
    assert summary["seconds"] > sum(seconds)
    assert same["seconds"] > sum(seconds)


def no_network(root: Path) -> None:
    raise OSError("no network")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "imagenet"], "invalid choice: 'imagenet'"),
        (["train", "digits", "--threads", "0"], "expected at least 1, got 0"),
        (["train", "digits", "--set", "optim.rate=1"], "no setting 'optim.rate'; there are: "),
        (
            ["train", "digits", "--set", "data.dataset=absent"],
            "data.dataset: expected one of digit",
        ),
        (["train", "retinopathy-resnet18"], "or a folder, as --data gives, got 'retinopathy'"),
        (["train", "digits", "--set", "data.validation=none"], "expected a validation part, got"),
        (["train", "digits", "--set", "model.name=alexnet"], "got 'alexnet'"),
        (["train", "digits", "--pretrained", "absent.pt"], "got 'absent.pt'"),
        (
            ["train", "digits", *("--set", "model.head=lab3"), *("--set", "model.name=vgg11_bn")],
            "model: expected a ResNet",
        ),
        (["train", "digits", "--set", "model.head=lab3"], "expected a ResNet of total stride 32"),
        (["train", "digits", "--set", "data.batch_size=5000"], "one full batch of 5000 images"),
        (["train", "digits", "--resume"], "--resume: expected --output"),
        (["train", "digits", "--resume", "--output", "."], "expected the folder of a run, got ."),
        (["eval", "absent"], "expected the folder of a run, or a file of its weights, got absent"),
        ([], "required: COMMAND"),
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
        status = cli.main(arguments)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_of_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "fastresnet.cli.train", raising=False)
    assert cli.main(["train", "digits"]) == 2
    assert "pip install 'fastresnet[train]'" in capsys.readouterr().err


def test_info_says_what_is_active_and_why_not(tmp_path: Path) -> None:
    done = run("-m", "fastresnet", "info", cwd=tmp_path, FASTRESNET_DISABLE="1")
    assert done.returncode == 0, done.stderr
    for section in ("versions", "machine", "build", "kernels", "data backends", "variables"):
        assert f"\n{section}\n" in f"\n{done.stdout}"
    assert done.stdout.count("not active: FASTRESNET_DISABLE=1") == 2
    assert re.search(r"^  FASTRESNET_DISABLE +1$", done.stdout, re.MULTILINE)


def test_info_never_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> dict:
        raise RuntimeError("no such build\nsecond line")

    monkeypatch.setattr(environment._extension, "build_info", broken)
    monkeypatch.setattr(environment.torch.cpu, "get_capabilities", broken)
    monkeypatch.setattr(environment.torch.cuda, "device_count", broken)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("unknown (RuntimeError: no such build)") == 3
    assert "second line" not in printed


def test_environment_is_json() -> None:
    facts = environment.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"]
