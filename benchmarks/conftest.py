# SPDX-License-Identifier: Apache-2.0
"""`pytest benchmarks`: each benchmark is a test whose timed function is one interleaved round.

pytest-benchmark keeps its own statistics of the rounds; the figures that count, one row a provider,
go to benchmarks/results/. What takes hours is left out unless its option asks for it; what needs a
GPU is skipped where there is none, but fails if FASTRESNET_REQUIRE_CUDA=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from harness import Comparison, Row, append, summary
from roofline import Roofline, measure

OPT_IN = {
    "all_shapes": "the convolutions of every network, size and batch, in both dtypes",
    "scaling": "training steps and inferences of every factory and along batch, side and threads",
    "time_to_accuracy": "trainings of a ResNet-18 until it knows clothes",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=7, help="timed rounds, at least 5 for a result")
    for marker, text in OPT_IN.items():
        parser.addoption(f"--{marker.replace('_', '-')}", action="store_true", help=f"also {text}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_without_gpu(items)
    left_out = {marker for marker in OPT_IN if not config.getoption(marker)}
    deselected = [item for item in items if left_out & item.keywords.keys()]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]


def skip_without_gpu(items: list[pytest.Item]) -> None:
    """Marks what needs a GPU where there is none, unless one is required."""
    if torch.cuda.is_available() or os.environ.get("FASTRESNET_REQUIRE_CUDA") == "1":
        return
    for item in items:
        if "needs_cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU is visible to torch"))


@pytest.fixture
def record() -> Callable[[Sequence[Row]], None]:
    """Writes and prints a comparison's rows; fails if a provider of ours failed."""

    def record(rows: Sequence[Row]) -> None:
        path = append(rows)
        print(f"\n{summary(rows)}\n  -> {path.name}")
        failed = [row for row in rows if row.role == "ours" and row.status != "ok"]
        assert not failed, "; ".join(f"{row.provider}: {row.status}" for row in failed)

    return record


@pytest.fixture
def run(
    request: pytest.FixtureRequest, benchmark, record: Callable[[Sequence[Row]], None]
) -> Callable[[Comparison], None]:
    """Warms up, times and records a checked comparison."""

    def run(comparison: Comparison) -> None:
        comparison.warm_up()
        benchmark.pedantic(comparison.round, rounds=request.config.getoption("rounds"))
        rows = comparison.rows()
        benchmark.group = comparison.suite
        benchmark.extra_info |= {row.provider: row.p50 for row in rows}
        record(rows)

    return run


@pytest.fixture(scope="session")
def roofline() -> Roofline:
    """The machine's own limits, measured once in the run that they are compared with."""
    return measure()
