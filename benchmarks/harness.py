# SPDX-License-Identifier: Apache-2.0
"""Times several providers of the same work against each other, and records what it saw.

The providers run in turn, A B A B, in one process, after their results were compared with float64,
or with float32 where a row says so. The baseline runs twice in each round: what separates it from
itself is the run's noise. Knows nothing of models or operators; a bench_*.py file brings the steps
and their results.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# torch reads it at its first allocation. Huge pages are worth 6 to 10 % to eager torchvision, so
# every provider gets them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torchvision
from clocks import Clock, clock_of

import fastresnet
from fastresnet import _extension

RESULTS = Path(__file__).parent / "results"
SAME_AGAIN = "same again"  # the provider name of the baseline's second run in a round
WARM_UP_ROUNDS = 2
ERROR_RATIO = 1.5  # how much further from float64 than the baseline a provider may be
TELLING = 0.5  # an allowed relative error above this would let wrong results pass; zeros have 1


@dataclass
class Row:
    """One provider's figures in one comparison; the rows of a comparison share a timestamp.

    better: "higher" or "lower", which values of the metric win. figures: further values of the
    same measurement, by name. Rows written before these two existed lack them.
    """

    suite: str
    case: str
    provider: str
    role: str
    metric: str
    unit: str
    p20: float | None
    p50: float | None
    p80: float | None
    n: int
    status: str
    errors: dict[str, float]
    config: dict[str, Any]
    bar: float | None
    machine: dict[str, Any]
    timestamp: str
    better: str = "higher"
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Provider:
    """A way to do the work.

    role: "baseline" (a peer, and what the noise is measured on), "peer" (competes), "ours", or
    "context" (shown, but neither competes nor is checked: it may compute in another precision).
    step: does the work once. results: the tensors that step computes, by name, for the check.
    """

    name: str
    role: str
    step: Callable[[], Any]
    results: Callable[[], Mapping[str, torch.Tensor]]
    status: str = "ok"
    errors: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


class Comparison:
    """Providers of the same work, checked and then timed in turn.

    work: how many units of `unit` one step does, so that figures are rates (higher is better).
    bar: the least ratio of ours to the best peer that the project promises, if it promises one.
    figures: what else the seconds of a step at the median rate say, by name.
    clock: what times a step; by default the device's own.
    """

    def __init__(
        self,
        suite: str,
        case: str,
        *,
        metric: str,
        unit: str,
        work: float,
        config: dict[str, Any],
        bar: float | None = None,
        device: str = "cpu",
        figures: Callable[[float], dict[str, float]] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.suite, self.case, self.metric, self.unit = suite, case, metric, unit
        self.work, self.config, self.bar, self.device = work, config, bar, device
        self.figures = figures
        self.clock = clock or clock_of(device)
        self.providers: list[Provider] = []
        self._same_again: list[float] = []
        self._rounds = 0

    @property
    def baseline(self) -> Provider:
        return next(provider for provider in self.providers if provider.role == "baseline")

    def add(
        self,
        name: str,
        step: Callable[[], Any],
        results: Callable[[], Mapping[str, torch.Tensor]],
        *,
        role: str,
    ) -> None:
        self.providers.append(Provider(name, role, step, results))

    def check(
        self,
        truth: Mapping[str, torch.Tensor],
        *,
        partial: bool = False,
        elsewhere: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Compares each provider's results with `truth`; one that is further from it than
        1.5 times the baseline, or that raises, is recorded as failed and not timed.

        partial: a result that the baseline itself has too far from the truth to tell right from
        wrong is left out and named in the config, as long as another result does tell.
        elsewhere: the baseline's largest errors on other inputs, asked for (and named in the
        config) only where a provider is further off, for work whose error depends on the input's
        luck.
        """
        untelling: list[str] = []
        others: Mapping[str, float] = {}
        for provider in sorted(self.providers, key=lambda provider: provider.role != "baseline"):
            context = provider.role == "context"
            try:
                results = provider.results()
                wanted = {n: t for n, t in truth.items() if n in results} if context else truth
                provider.errors = relative_errors(results, wanted)
            except Exception as error:  # a provider that does not run is a row, not the end
                provider.status = f"failed: {type(error).__name__}: {first_line(error)}"
                continue
            if provider.role == "baseline":
                untelling = [name for name in truth if not self._allowed(name) <= TELLING]
                if untelling and not (partial and len(untelling) < len(truth)):
                    worst = max(provider.errors[name] for name in untelling)
                    raise ValueError(
                        f"{self.case}: the baseline's {', '.join(untelling)} is {worst:.2f} from "
                        "the truth: too far for a check against it to tell right from wrong"
                    )
                if untelling:
                    self.config["unchecked"] = untelling
            if context:
                continue
            for name in truth.keys() - set(untelling):
                value, allowed = provider.errors[name], self._allowed(name)
                if not value <= allowed and elsewhere is not None:
                    others = others or elsewhere()
                    self.config["baseline_elsewhere"] = dict(others)
                    allowed = max(allowed, min(TELLING, ERROR_RATIO * others[name]))
                if not value <= allowed:
                    provider.status = f"failed: {name} is {value:.2e} from truth ({allowed:.2e})"

    def _allowed(self, name: str) -> float:
        # Below one rounding of the storage type, errors do not compare.
        rounding = torch.finfo(getattr(torch, self.config["dtype"])).eps
        return ERROR_RATIO * max(self.baseline.errors[name], rounding)

    def warm_up(self) -> None:
        for _ in range(WARM_UP_ROUNDS):
            self.round()
        self._rounds = 0
        self._same_again.clear()
        for provider in self.providers:
            provider.seconds.clear()

    def round(self) -> None:
        """Times every provider once, the baseline twice; every second round in reverse."""
        runs = [(p.step, p.seconds) for p in self.providers if p.status == "ok"]
        runs.append((self.baseline.step, self._same_again))
        for step, seconds in runs if self._rounds % 2 == 0 else reversed(runs):
            seconds.append(self.clock(step))
        self._rounds += 1

    def rows(self) -> list[Row]:
        now = timestamp()
        here = machine(self.device)
        baseline = self.baseline
        same = Provider(SAME_AGAIN, "noise", baseline.step, baseline.results)
        same.seconds = self._same_again
        rows = []
        for provider in [*self.providers, same]:
            rate = percentiles([self.work / second for second in provider.seconds])
            timed = rate["p50"] is not None
            row = Row(
                suite=self.suite,
                case=self.case,
                provider=provider.name,
                role=provider.role,
                metric=self.metric,
                unit=self.unit,
                **rate,
                n=len(provider.seconds),
                status=provider.status,
                errors=provider.errors,
                config=self.config,
                bar=self.bar,
                machine=here,
                timestamp=now,
                figures=self.figures(self.work / rate["p50"]) if self.figures and timed else {},
            )
            rows.append(row)
        return rows


def relative_errors(
    results: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """For each result its distance from `truth`, over the norm of that; in float64."""
    return {
        name: float((results[name].double() - right).norm() / right.norm())
        for name, right in truth.items()
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """The 20th, 50th and 80th percentile; None where nothing was measured."""
    if not values:
        return {"p20": None, "p50": None, "p80": None}
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[3]}


def summary(rows: Sequence[Row]) -> str:
    """One line a provider, for the terminal."""
    lines = [f"{rows[0].suite} {rows[0].case}"]
    for row in rows:
        text = f"{row.p50:10.4g} {row.unit}" if row.p50 is not None else f"  {row.status}"
        more = "".join(f", {value:.3g} {name}" for name, value in row.figures.items())
        lines.append(f"  {row.provider:28} {text}{more}")
    return "\n".join(lines)


def append(rows: Sequence[Row]) -> Path:
    """Appends a comparison's rows to its suite's file of the day, and returns that."""
    here = rows[0].machine
    name = here.get("gpu", here["cpu"])
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {here['isa']}".lower()).strip("-")
    torch_version = "".join(torch.__version__.split(".")[:2])
    day = rows[0].timestamp[:10].replace("-", "")
    path = RESULTS / f"{rows[0].suite}-{slug}-pt{torch_version}-{day}.jsonl"
    RESULTS.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    return path


def timestamp() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code under test."""
    facts = {
        "device": device,
        "cpu": cpu_model(),
        "isa": torch.ops.fastresnet.isa() if _extension.cpu_missing is None else "none",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ["THP_MEM_ALLOC_ENABLE"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "fastresnet": fastresnet.__version__,
        "git": git_revision(),
    }
    if device != "cpu":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.machine()
    found = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.+?)\s*$", info.read_text(), re.M))
    if "model name" not in found:
        return platform.machine()
    # Virtual machines call several generations by one name.
    numbers = [found.get(key, "unknown") for key in ("cpu family", "model")]
    return f"{found['model name']} (family {numbers[0]}, model {numbers[1]})"


def git_revision(folder: Path = RESULTS.parent) -> str:
    """The commit checked out, "-dirty" behind it if files differ from it: other files than results,
    to which measuring itself adds."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        commit = git("describe", "--always")
        changes = git("diff", "--quiet", "HEAD", "--", ":/", f":(exclude){RESULTS.name}")
    except OSError:
        return "unknown"
    if commit.returncode:
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if changes.returncode else "")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
