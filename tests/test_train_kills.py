# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at random moments, again and again, ends as the undisturbed one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train_loop import assert_same_run

# Training runs in forks of this process, which has imported everything: what is killed is training.
KILLER = """
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from test_train_loop import EVERYTHING, recipe, trainer

torch.set_num_threads(1)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
config = recipe(*EVERYTHING, "schedule.epochs=12", "checkpoint.every_steps=3")


def train(name, seconds):
    # Whether the training came to its end within these seconds.
    child = os.fork()
    if not child:
        run = trainer(folder / name, config)
        run.resume()
        run.fit()
        os._exit(0)
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


begin = time.monotonic()
assert train("undisturbed", 120)
duration = time.monotonic() - begin
draw = random.Random(0)
killed = runs = 0
while killed < kills:
    runs += 1
    while not train(f"killed-{runs}", draw.uniform(0, duration) if killed < kills else 120):
        killed += 1
print(f"{killed} kills in {runs} runs of {duration:.2f} s")
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_as_the_undisturbed_one(tmp_path: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(kills)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    runs = sorted(tmp_path.glob("killed-*"))
    assert runs
    for run in runs:
        assert_same_run(run, tmp_path / "undisturbed")
