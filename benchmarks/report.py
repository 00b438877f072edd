# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table and its plot from benchmarks/results/*.jsonl, so that no number is
typed by hand: `python benchmarks/report.py`. `--suite operators` prints another suite's table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PLOT = HERE / "results" / "train_step.png"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SUITES = ("train_step", "operators")


@dataclass(frozen=True)
class Result:
    """The rows of one comparison, by provider."""

    rows: dict[str, dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        return next(iter(self.rows.values()))

    def best(self, *roles: str) -> dict[str, Any] | None:
        timed = [row for row in self.rows.values() if row["role"] in roles and row["p50"]]
        return max(timed, key=lambda row: row["p50"], default=None)

    @property
    def noise(self) -> float:
        """What separates the baseline from itself in this run, or its own spread if greater."""
        same, baseline = self.best("noise"), self.best("baseline")
        if same is None or baseline is None:
            return 0.0
        spread = (baseline["p80"] - baseline["p20"]) / 2 / baseline["p50"]
        return max(abs(same["p50"] / baseline["p50"] - 1), spread)

    @property
    def ratio(self) -> float | None:
        """Ours, the better of the ways to run it, over the best peer."""
        ours, peer = self.best("ours"), self.best("baseline", "peer")
        return ours["p50"] / peer["p50"] if ours and peer else None

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "failed"
        if abs(self.ratio - 1) <= self.noise:
            text = f"no difference ({self.ratio:.2f})"
        else:
            text = f"**{self.ratio:.2f}**" if self.ratio > 1 else f"{self.ratio:.2f} (slower)"
        bar = self.first["bar"]
        return text if bar is None or self.ratio >= bar else f"{text}, below the aim of {bar}"


def read(suite: str) -> list[dict[str, Any]]:
    files = sorted((HERE / "results").glob(f"{suite}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def latest(rows: Iterable[dict[str, Any]]) -> list[Result]:
    """The last comparison of each case on each machine, in the order they were first run."""
    runs: dict[tuple[str, ...], dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        here = row["machine"]
        key = (here["device"], here["cpu"], here["isa"], str(here["threads"]), row["case"])
        runs.setdefault(key, {}).setdefault(row["timestamp"], {})[row["provider"]] = row
    return [Result(by_time[max(by_time)]) for by_time in runs.values()]


def table(results: list[Result]) -> str:
    """One Markdown table a machine, a column for each provider seen."""
    parts = []
    for place in dict.fromkeys(describe(result) for result in results):
        here = [result for result in results if describe(result) == place]
        providers = list(
            dict.fromkeys(
                name
                for result in here
                for name, row in result.rows.items()
                if row["role"] != "noise"
            )
        )
        lines = [
            f"| {here[0].first['unit']} | {' | '.join(providers)} | ours / best peer | noise |",
            f"|---|{'---:|' * (len(providers) + 2)}",
        ]
        for result in here:
            figures = " | ".join(figure(result.rows.get(name)) for name in providers)
            case = result.first["case"]
            lines.append(f"| {case} | {figures} | {result.verdict} | {result.noise:.1%} |")
        parts.append(f"{place}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def figure(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['p50']:.3g}" if row["p50"] else row["status"].partition(":")[0]


def describe(result: Result) -> str:
    here, day = result.first["machine"], result.first["timestamp"][:10]
    processor = here.get("gpu", here["cpu"])
    return (
        f"{processor}, {here['threads']} threads, {here['isa']}, torch {here['torch']}, "
        f"torchvision {here['torchvision']}, {day}:"
    )


def plot(results: list[Result]) -> None:
    """Ours and torchvision over the best peer, a group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if result.ratio is not None]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(shown) + 1.2), layout="constrained")
    labels = [result.first["case"] for result in shown]
    stock = [relative(result, "context") for result in shown]
    positions = range(len(shown))
    axes.barh([y + 0.2 for y in positions], [r.ratio for r in shown], 0.38, label="fastresnet")
    axes.barh([y - 0.2 for y in positions], stock, 0.38, label="stock torchvision", color="0.7")
    axes.axvline(1, color="black", linewidth=1, label="best peer")
    axes.set_yticks(list(positions), labels)
    axes.invert_yaxis()
    axes.set_xlabel("speed of a training step, best peer = 1")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, dpi=120)
    pyplot.close(figure)


def relative(result: Result, role: str) -> float:
    row, peer = result.best(role), result.best("baseline", "peer")
    return row["p50"] / peer["p50"] if row and peer else 0.0


def write_readme(text: str) -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README} lacks the lines {BEGIN} and {END}")
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, help="print this suite's table only")
    suite = parser.parse_args().suite
    results = latest(read(suite or "train_step"))
    if not results:
        raise SystemExit("no results yet: run `pytest benchmarks` first")
    if suite is not None:
        print(table(results))
        return
    plot(results)
    name = PLOT.relative_to(README.parent)
    write_readme(f"{table(results)}\n\n![Speed of a training step]({name})")
    print(f"wrote {README.name} and {name}")


if __name__ == "__main__":
    main()
