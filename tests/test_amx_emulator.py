# SPDX-License-Identifier: Apache-2.0
"""The amx level on processors without AMX: the library built with tests/emulator/amx.h in place of
the tile intrinsics passes the convolutions' tests, and the real one holds the real instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastresnet

TESTS = Path(__file__).resolve().parent
EMULATOR = TESTS / "emulator" / "amx.h"

pytestmark = pytest.mark.skipif(
    "avx512_bf16" not in torch.ops.fastresnet.isa_levels(),
    reason="around its tiles the amx level needs AVX-512 bf16",
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, its CPU library built on the emulated tiles."""
    folder = tmp_path_factory.mktemp("amx")
    built = folder / "lib"
    done = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-base", str(folder), "--build-lib", built],
        cwd=TESTS.parent,
        env={**os.environ, "CFLAGS": f"-include {EMULATOR}", "FASTRESNET_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return built


def run(package: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package), "FASTRESNET_ISA": "amx"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow  # builds the library once more
def test_the_convolutions(package: Path):
    done = run(package, "-c", "import fastresnet as f; print(f.__file__, f._extension.cpu_level)")
    assert done.stdout.split() == [str(package / "fastresnet" / "__init__.py"), "amx"], done.stderr
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={TESTS.parent}",
        "-k",
        "bfloat16 or random",
    ]
    done = run(package, "-m", "pytest", str(TESTS / "test_conv.py"), *options)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"\d{3} passed", done.stdout)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_the_library_holds_tile_products():
    library = next(Path(fastresnet.__file__).parent.glob("_C.*so"))
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    for instruction in ("ldtilecfg", "tdpbf16ps", "tilerelease"):
        assert instruction in code, instruction
