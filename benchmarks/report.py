# SPDX-License-Identifier: Apache-2.0
"""Writes the README's short tables, docs/benchmarks.md with every table, and the plots from
benchmarks/results/*.jsonl, so that no number is typed by hand: `python benchmarks/report.py`.
`--suite operators` prints one suite's table."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# What each suite's tables show.
SUITES = {
    "train_step": (
        "A training step (forward, loss, backward, SGD with momentum); higher is better. Where the "
        "processor's family is named, each has its fastest SGD: ours fastresnet.optim's, torch's "
        "in channels_last that by foreach. Earlier rows are with torch's fused SGD for all."
    ),
    "inference": (
        "Inference: images in, logits out; higher is better. torch.compile with frozen weights; "
        "OpenVINO and ONNX Runtime fail where they are not installed."
    ),
    "train_memory": (
        "Peak memory of a training step above the idle state, model and optimiser's state being "
        "there; lower is better."
    ),
    "conv_layers": (
        "The convolutions of a network's blocks with their batch norms and ReLUs, summed over the "
        "blocks; lower is better. The floor is the longer of multiplying and moving the same, at "
        "the speeds that torch.mm and a copy or sum of a large tensor reached in the same run; "
        "minimal filtering multiplies less, and can be faster than that."
    ),
    "data": (
        "Loaders: JPEG files to augmented batches of 512 px, and 50,000 images of 32 px in memory, "
        "on two threads or processes; higher is better. DALI on the CPU."
    ),
    "warp": (
        "Crop, resize, turn and normalise: batches from bytes to float32, without decoding; higher "
        "is better."
    ),
    "cuda_train_step": (
        "A training step on a GPU, without waiting for data; higher is better. torchvision in "
        "channels_last under autocast."
    ),
    "cuda_inference": "The logits of a batch on a GPU; higher is better.",
    "train_scaling": (
        "How a training step grows with network, batch, side and threads; SGD as in the training "
        "steps above."
    ),
    "inference_scaling": "How an inference grows with network, batch and side.",
    "time_to_accuracy": (
        "Seconds of training until the test images are known that well, ours and torchvision's "
        "ResNet-18 each on its own loader, in turn epoch by epoch; lower is better. Fashion-MNIST "
        "written as CIFAR-10, one run of each."
    ),
    "operators": "Each fused operator, forward and backward; higher is better.",
}
IN_README = ("train_step", "inference", "train_memory", "conv_layers", "data", "time_to_accuracy")
# What the bars of a suite's plot show.
PLOTTED = {
    "train_step": "speed of a training step, best peer = 1",
    "inference": "speed of an inference, best peer = 1",
    "train_memory": "memory of a training step, best peer = 1",
    "conv_layers": "speed of the convolutions, the floor = 1",
}
STOCK = "stock torchvision"  # the name of its provider
PAGE_INTRODUCTION = (
    "Written by `benchmarks/report.py` from the measurements in `benchmarks/results/`: the latest "
    "of each case on each machine, losing rows included. Speeds: providers run in turn in one "
    "process, after their results were compared with float64. Memory: a process for each. Noise is "
    "what separates the baseline from its second run."
)


@dataclass(frozen=True)
class Result:
    """The rows of one comparison, by provider."""

    rows: dict[str, dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        return next(iter(self.rows.values()))

    @property
    def lower_is_better(self) -> bool:
        return self.first.get("better") == "lower"

    def best(self, *roles: str) -> dict[str, Any] | None:
        """The best row of these roles, or of providers of these names."""
        rows = (row for row in self.rows.values() if {row["role"], row["provider"]} & set(roles))
        timed = [row for row in rows if row["p50"]]
        sign = -1 if self.lower_is_better else 1
        return max(timed, key=lambda row: sign * row["p50"], default=None)

    @property
    def peer(self) -> dict[str, Any] | None:
        """The best of what someone could run instead, torchvision as it is delivered included: at
        small sizes that may be its fastest form."""
        return self.best("baseline", "peer", STOCK)

    @property
    def noise(self) -> float | None:
        """What separates the baseline from itself in this run, or its own spread if greater; None
        where it ran but once."""
        same, baseline = self.best("noise"), self.best("baseline")
        if same is None or baseline is None:
            return None
        spread = (baseline["p80"] - baseline["p20"]) / 2 / baseline["p50"]
        return max(abs(same["p50"] / baseline["p50"] - 1), spread)

    @property
    def ratio(self) -> float | None:
        """Ours, the better of the ways to run it, over the best peer; of the metric itself."""
        ours, peer = self.best("ours"), self.peer
        return ours["p50"] / peer["p50"] if ours and peer else None

    @property
    def verdict(self) -> str:
        return verdict(self.ratio, self.noise, self.first["bar"], lower=self.lower_is_better)


def verdict(
    ratio: float | None, noise: float | None, bar: float | None, *, lower: bool = False
) -> str:
    """A ratio of ours to the best peer in words: a gain in bold, a loss and a missed bar named."""
    if ratio is None:
        return "failed"
    gains = ratio < 1 if lower else ratio > 1
    reached = bar is None or (ratio <= bar if lower else ratio >= bar)
    if abs(ratio - 1) <= (noise or 0.0):
        text = f"no difference ({ratio:.2f})"
    elif gains:
        text = f"**{ratio:.2f}**"
    else:
        text = f"{ratio:.2f} ({'more' if lower else 'slower'})"
    return text if reached else f"{text}, {'above' if lower else 'below'} the aim of {bar:g}"


def read(suite: str) -> list[dict[str, Any]]:
    files = sorted(RESULTS.glob(f"{suite}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def latest(rows: Iterable[dict[str, Any]]) -> list[Result]:
    """The last comparison of each case on each machine, in the order they were first run."""
    runs: dict[tuple[str, ...], dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        here = row["machine"]
        key = (here.get("gpu", "cpu"), here["cpu"], here["isa"], str(here["threads"]), row["case"])
        runs.setdefault(key, {}).setdefault(row["timestamp"], {})[row["provider"]] = row
    return [Result(by_time[max(by_time)]) for by_time in runs.values()]


def table(results: list[Result]) -> str:
    """One Markdown table a machine, a column for each provider seen."""
    parts = []
    for place, here in by_place(results).items():
        providers = provider_names(here)
        lines = header(here[0].first["unit"], [*providers, "ours / best peer", "noise"])
        for result in here:
            figures = " | ".join(figure(result.rows.get(name)) for name in providers)
            case = result.first["case"]
            lines.append(f"| {case} | {figures} | {result.verdict} | {share(result.noise)} |")
        parts.append(f"{place}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def by_place(results: list[Result]) -> dict[str, list[Result]]:
    """The results on each machine, by the line that describes it and when they were measured."""
    places: dict[str, list[Result]] = {}
    for result in results:
        places.setdefault(describe(result), []).append(result)
    return {f"{place}, {days(here)}:": here for place, here in places.items()}


def days(results: list[Result]) -> str:
    seen = [result.first["timestamp"][:10] for result in results]
    return min(seen) if min(seen) == max(seen) else f"{min(seen)} to {max(seen)}"


def provider_names(results: list[Result]) -> list[str]:
    rows = (row for result in results for row in result.rows.values())
    return list(dict.fromkeys(row["provider"] for row in rows if row["role"] != "noise"))


def header(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]


@dataclass(frozen=True)
class NetworkSum:
    """The layers of one network in one direction, each as often as the network has it."""

    network: str
    mode: str
    results: list[Result]

    def seconds(self, role: str) -> float | None:
        """None where this role's provider failed at a layer."""
        rows = [row for r in self.results for row in r.rows.values() if row["role"] == role]
        if not all(row["p50"] for row in rows):
            return None
        return sum(row["config"]["count"] * row["figures"]["ms"] / 1e3 for row in rows)

    @property
    def floor_seconds(self) -> float:
        configs = [result.first["config"] for result in self.results]
        return sum(config["count"] * config["floor_seconds"] for config in configs)

    def share(self, role: str) -> float | None:
        """How much of this role's time the floor takes."""
        seconds = self.seconds(role)
        return self.floor_seconds / seconds if seconds else None

    @property
    def noise(self) -> float:
        """How far the baseline's sum is from that of its second run."""
        baseline, same = self.seconds("baseline"), self.seconds("noise")
        return abs(same / baseline - 1) if baseline and same else 0.0

    @property
    def ratio(self) -> float | None:
        """Torch's time over ours: above 1 ours is faster."""
        peer, ours = self.seconds("baseline"), self.seconds("ours")
        return peer / ours if peer and ours else None


def network_sums(results: list[Result]) -> list[NetworkSum]:
    """Of the networks of which every layer was measured."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        config = result.first["config"]
        groups.setdefault((config["network"], config["mode"]), []).append(result)
    return [
        NetworkSum(*key, group)
        for key, group in groups.items()
        if len(group) == group[0].first["config"]["layers"]
    ]


def layer_summary(results: list[Result]) -> str:
    """A row for each network and direction: the sums of its layers' times, and the floor's."""
    parts = []
    for place, here in by_place(results).items():
        totals = network_sums(here)
        if not totals:
            continue
        names = {row["role"]: name for name, row in here[0].rows.items() if row["role"] != "noise"}
        columns = [*names.values(), "floor", "of the floor", "torch / ours", "noise"]
        lines = header("ms", columns)
        for total in totals:
            sums = [total.seconds(role) for role in names]
            cells = [f"{1e3 * value:.4g}" if value else "failed" for value in sums]
            share = total.share("ours")
            cells += [f"{1e3 * total.floor_seconds:.4g}", f"{share:.0%}" if share else ""]
            cells += [verdict(total.ratio, total.noise, None), f"{total.noise:.1%}"]
            lines.append(f"| {total.network}, {total.mode} | {' | '.join(cells)} |")
        parts.append(f"{place}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) or "No network was measured whole."


def layer_table(results: list[Result]) -> str:
    """Every layer: GFLOP/s, GB/s and the share of the floor for each provider."""
    parts = []
    for place, here in by_place(results).items():
        providers = provider_names(here)
        units = [f"{name}: GFLOP/s, GB/s, of the floor" for name in providers]
        lines = header("case", ["times", *units, "ours / torch", "noise"])
        for result in here:
            cells = [layer_figure(result.rows.get(name)) for name in providers]
            cells = [str(result.first["config"]["count"]), *cells]
            cells += [result.verdict, share(result.noise)]
            lines.append(f"| {result.first['case']} | {' | '.join(cells)} |")
        roofs = dict.fromkeys(roof(result.first["config"]) for result in here)
        parts.append(f"{place}\n\nFloors: {'; '.join(roofs)}.\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def layer_figure(row: dict[str, Any] | None) -> str:
    if row is None or not row["p50"]:
        return figure(row)
    return f"{row['p50']:.0f}, {row['figures']['GB/s']:.1f}, {row['figures']['floor']:.0%}"


def roof(config: dict[str, Any]) -> str:
    """What a layer's floor rests on."""
    multiply, bandwidth = config["roofline"]["multiply"], config["roofline"]["bandwidth"]
    return (
        f"{config['dtype']} {multiply['rate']:.0f} GFLOP/s ({multiply['name']}), "
        f"{bandwidth['rate']:.1f} GB/s ({bandwidth['name']})"
    )


def tables(suite: str, results: list[Result], *, short: bool = False) -> str:
    """short: without the table of each layer."""
    if suite != "conv_layers":
        return table(results)
    summary = layer_summary(results)
    return summary if short else f"{summary}\n\n{layer_table(results)}"


def figure(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["p50"]:
        return row["status"].partition(":")[0]
    rounded = f"{row['p50']:.3g}"
    return f"{float(rounded):,.0f}" if "e+" in rounded else rounded


def share(noise: float | None) -> str:
    return "unknown" if noise is None else f"{noise:.1%}"


def describe(result: Result) -> str:
    here = result.first["machine"]
    processor = here.get("gpu", here["cpu"])
    return (
        f"{processor}, {here['threads']} threads, {here['isa']}, torch {here['torch']}, "
        f"torchvision {here['torchvision']}"
    )


def plot(suite: str, results: list[Result]) -> Path | None:
    """Bars relative to the best peer, a group a case; None where there is nothing to draw."""
    if suite == "conv_layers":
        return plot_layers(results)
    shown = [result for result in results if result.ratio is not None]
    if not shown:
        return None
    bars = {"fastresnet": [result.ratio for result in shown]}
    context = [relative(result, "context") for result in shown]
    if any(context):
        bars[STOCK] = context
    labels = [result.first["case"] for result in shown]
    return draw(suite, labels, bars)


def plot_layers(results: list[Result]) -> Path | None:
    """The floor's share that ours and torch's reach, over each network that is complete."""
    totals = [total for total in network_sums(results) if total.ratio is not None]
    if not totals:
        return None
    bars = {
        name: [total.share(role) for total in totals]
        for name, role in (("fastresnet", "ours"), ("torch", "baseline"))
    }
    labels = [f"{total.network}, {total.mode}" for total in totals]
    return draw("conv_layers", labels, bars)


def draw(suite: str, labels: list[str], bars: dict[str, list[float]]) -> Path:
    """Horizontal bars, a group for each label; the first of a group is ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(labels) + 1.2), layout="constrained")
    height = 0.8 / len(bars)
    for index, (name, values) in enumerate(bars.items()):
        places = [y + (index - (len(bars) - 1) / 2) * height for y in range(len(labels))]
        color = "C0" if index == 0 else "0.7"
        axes.barh(places, values, 0.95 * height, label=name, color=color)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(PLOTTED[suite])
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = RESULTS / f"{suite}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def relative(result: Result, role: str) -> float:
    row, peer = result.best(role), result.peer
    return row["p50"] / peer["p50"] if row and peer else 0.0


def section(
    suite: str, results: list[Result], plotted: Path | None, page: Path, *, short: bool = False
) -> str:
    """A suite's text, tables and plot as Markdown on `page`."""
    parts = [SUITES[suite], tables(suite, results, short=short)]
    if plotted is not None:
        parts.append(f"![{suite.replace('_', ' ')}]({relative_link(plotted, page)})")
    return "\n\n".join(parts)


def relative_link(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def write_readme(text: str) -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README} lacks the lines {BEGIN} and {END}")
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def write_page(sections: dict[str, str]) -> None:
    titles = [f"## {suite.replace('_', ' ')}\n\n{text}" for suite, text in sections.items()]
    text = "\n\n".join(["# Benchmarks", PAGE_INTRODUCTION, *titles])
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, help="print this suite's tables only")
    suite = parser.parse_args().suite
    found = {name: latest(read(name)) for name in ([suite] if suite else SUITES)}
    found = {name: results for name, results in found.items() if results}
    if not found:
        raise SystemExit("no results yet: run `pytest benchmarks` first")
    if suite is not None:
        print(tables(suite, found[suite]))
        return
    plots = {name: plot(name, found[name]) for name in PLOTTED if name in found}
    short = [
        section(name, found[name], plots.get(name), README, short=True)
        for name in IN_README
        if name in found
    ]
    link = relative_link(PAGE, README)
    write_readme("\n\n".join([*short, f"Everything measured: [{link}]({link})."]))
    write_page({name: section(name, r, plots.get(name), PAGE) for name, r in found.items()})
    print(f"wrote {README.name}, {link} and {len(plots)} plots")


if __name__ == "__main__":
    main()
