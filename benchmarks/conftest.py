# SPDX-License-Identifier: Apache-2.0
"""`pytest benchmarks`: each benchmark is a test whose timed function is one interleaved round.

pytest-benchmark keeps its own statistics of the rounds; the figures that count, one row a provider,
go to benchmarks/results/.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness import Comparison, append


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=7, help="timed rounds, at least 5 for a result")


@pytest.fixture
def run(request: pytest.FixtureRequest, benchmark) -> Callable[[Comparison], None]:
    """Warms up, times and records a checked comparison; fails if a provider of ours failed."""

    def run(comparison: Comparison) -> None:
        comparison.warm_up()
        benchmark.pedantic(comparison.round, rounds=request.config.getoption("rounds"))
        benchmark.group = comparison.suite
        benchmark.extra_info |= {row.provider: row.p50 for row in comparison.rows()}
        path = append(comparison)
        print(f"\n{comparison.summary()}\n  -> {path.name}")
        failed = [p for p in comparison.providers if p.role == "ours" and p.status != "ok"]
        assert not failed, "; ".join(f"{p.name}: {p.status}" for p in failed)

    return run
