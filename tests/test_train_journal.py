# SPDX-License-Identifier: Apache-2.0
"""What a run notes: lines that can be taken back, a table, TensorBoard's events."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fastresnet.train.checkpoint import CheckpointError
from fastresnet.train.journal import Journal
from fastresnet.train.revision import source_revision


def journal(folder: Path, *, tensorboard: bool = False) -> tuple[Journal, io.StringIO]:
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    return Journal(folder, tensorboard=tensorboard, console=console), printed


def test_what_came_after_a_mark_is_forgotten(tmp_path: Path) -> None:
    notes, _ = journal(tmp_path)
    notes.write("step", step=1, loss=0.5)
    mark = notes.mark()
    notes.write("step", step=2, loss=None)
    notes.go_back(mark, step=2)
    notes.write("epoch", epoch=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"event": "step", "step": 1, "loss": 0.5}, {"event": "epoch", "epoch": 1}]
    with pytest.raises(CheckpointError, match=r"expected the 1000 bytes .*, got \d+"):
        notes.go_back(1000, step=2)


def test_the_table_has_a_line_a_row(tmp_path: Path) -> None:
    notes, _ = journal(tmp_path)
    notes.write_table([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": None}])
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,loss", "1,0.5", "2,"]


def test_events_reach_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    notes, printed = journal(tmp_path, tensorboard=True)
    notes.plot(5, train_loss=1.0, val_kappa=None)
    notes.plot(6, train_loss=0.5)
    notes.close()
    resumed, _ = journal(tmp_path, tensorboard=True)
    resumed.go_back(0, step=6)
    resumed.plot(6, train_loss=0.25)
    resumed.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(5, 1.0), (6, 0.25)]
    assert printed.getvalue() == ""


def test_without_tensorboard_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    notes, printed = journal(tmp_path, tensorboard=True)
    notes.plot(1, train_loss=1.0)
    notes.plot(2, train_loss=1.0)
    notes.close()
    assert printed.getvalue().count("pip install tensorboard") == 1
    assert not (tmp_path / "tensorboard").exists()


def test_the_revision_is_that_of_a_clone_or_none() -> None:
    revision = source_revision()
    assert revision is None or len(revision.removesuffix("-dirty")) == 40
