# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or absent, exact, and without code in them."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fastresnet.train.checkpoint import (
    CheckpointError,
    load_state,
    load_weights,
    save_state,
    save_weights,
    write_atomically,
)


def network(width: int = 4) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1))
    return model.to(memory_format=torch.channels_last)


def test_weights_come_back_exactly_and_keep_their_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved, loaded = network(), network()
    save_weights(tmp_path / "weights.safetensors", saved, metadata={"epoch": "3"})
    load_weights(tmp_path / "weights.safetensors", loaded)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, network())
    with pytest.raises(CheckpointError, match="expected the weights of this model"):
        load_weights(path, network(width=5))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        load_weights(path, network())


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {"tensor": torch.randn(3), "rows": [{"epoch": 1, "loss": 0.1}], "none": None}
    save_state(tmp_path / "last.pt", state)
    loaded = load_state(tmp_path / "last.pt")
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert loaded == state


class Touch:
    """Unpickles by creating a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_loading_runs_no_code(tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    for save in (
        torch.save,
        lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    ):
        save({"state": Touch(evil)}, tmp_path / "last.pt")
        with pytest.raises(CheckpointError, match="expected a training state"):
            load_state(tmp_path / "last.pt")
        assert not evil.exists()
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "absent.pt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    # As readable to others as any file of this user.
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


WRITER = """
import sys
from pathlib import Path
import torch
from fastresnet.train.checkpoint import save_state
value = 0
while True:
    save_state(Path(sys.argv[1]), {"values": torch.full((500_000,), value)})
    value += 1
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.137)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    values = load_state(path)["values"]
    assert values.shape == (500_000,)
    assert (values == values[0]).all()
