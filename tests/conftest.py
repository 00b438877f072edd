# SPDX-License-Identifier: Apache-2.0
"""What every test may rely on: fixed random numbers, and a number of threads, that do not leak from
one test to the next, and no test that passes because there was nothing to run on."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import emulator
import pytest
import torch
from hypothesis import settings

from fastresnet import ops

# Machines differ in speed, and the first example compiles or loads what later ones reuse.
settings.register_profile("fastresnet", deadline=None, derandomize=True)
settings.load_profile("fastresnet")


@pytest.fixture(autouse=True)
def _fixed_random_numbers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _same_number_of_threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest) -> Callable[[str], ctypes.CDLL]:
    """Builds one file of tests/emulator, by its name, with the CUDA kernels that it includes."""
    include = emulator.toolkit_include()
    if isinstance(include, str):
        pytest.skip(include)
    if platform.system() != "Linux" or shutil.which("g++") is None:
        pytest.skip("the emulator needs g++ on Linux")
    cache = Path(request.config.cache.mkdir("emulator"))
    return lambda name: emulator.build(cache, name, include)


@pytest.fixture
def convolutions_at_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our convolutions are to be right on every level, also where torch's are preferred."""
    monkeypatch.setattr(ops.conv, "_LEVELS", torch.ops.fastresnet.isa_levels())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped where there is none, but fail if FASTRESNET_REQUIRE_CUDA=1."""
    if torch.cuda.is_available() or os.environ.get("FASTRESNET_REQUIRE_CUDA") == "1":
        return
    for item in items:
        if "needs_cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU is visible to torch"))
