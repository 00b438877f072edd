# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one training step above the idle state, ours beside torchvision's eager model.

Each provider is measured in a process of its own, so that no allocator has seen another's tensors:
this file, run with a case and a provider, prints the figures. Idle is a model before its first
step, and the optimiser's state: what a library keeps from one step to the next, be it memory for
results, scratch or compiled primitives, counts as memory of the step.

What is measured is the kernel's high-water mark of resident memory (VmHWM), set back to the present
value before each step through /proc/self/clear_refs, less the pages of files: code that a step
loads is none of its memory. Unlike the counters of torch's allocator it sees what is allocated past
torch, as our kernels' and oneDNN's scratch is. The first step is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

if __name__ == "__main__":
    # Torch's own default. The speed benchmarks' huge pages would round every tensor up to 2 MiB.
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"

from bench_train_step import Case, Trainer, batch
from harness import SAME_AGAIN, Row, machine, percentiles, timestamp
from providers import MODEL_PROVIDERS, head_of, initial_weights

STEPS = 3
LOSS_TOLERANCE = 0.02  # between two right losses in bfloat16, of the first steps
PROVIDERS = {p.name: p for p in MODEL_PROVIDERS if p.name in ("torchvision", "fastresnet")}
CASES = (
    Case("resnet50", 224, 16, "bfloat16", bar=0.65),
    Case("resnet18", 224, 16, "bfloat16"),
    Case("cifar_resnet18", 32, 128, "bfloat16"),
)


@dataclass(frozen=True)
class Usage:
    """Of one process. peaks: MiB above `idle`, one for each step."""

    idle: float
    peaks: list[float]
    losses: list[float]
    huge_pages: str


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_train_memory(case: Case, record: Callable[[Sequence[Row]], None]) -> None:
    record(compare(case))


def compare(case: Case) -> list[Row]:
    """A row for each provider, and one for the baseline again."""
    baseline = next(iter(PROVIDERS))
    usages = {name: measured(case, name) for name in PROVIDERS}
    usages[SAME_AGAIN] = measured(case, baseline)
    now, expected = timestamp(), usages[baseline]
    if isinstance(expected, str):
        raise RuntimeError(f"{case.name}: {baseline} {expected}")
    here = machine("cpu") | {"huge_pages": expected.huge_pages}
    rows = []
    for name, usage in usages.items():
        status = "ok" if isinstance(usage, Usage) else usage
        if isinstance(usage, Usage) and not same_losses(usage.losses, expected.losses):
            status = f"failed: losses {usage.losses}, {baseline}'s are {expected.losses}"
        ok = status == "ok"
        rows.append(
            Row(
                suite="train_memory",
                case=case.name,
                provider=name,
                role="noise" if name == SAME_AGAIN else PROVIDERS[name].role,
                metric="peak_memory",
                unit="MiB",
                **percentiles(usage.peaks if ok else []),
                n=len(usage.peaks) if ok else 0,
                status=status,
                errors={},
                config=asdict(case),
                bar=case.bar,
                machine=here,
                timestamp=now,
                better="lower",
                figures={"MiB idle": usage.idle} if ok else {},
            )
        )
    return rows


def same_losses(losses: Sequence[float], expected: Sequence[float]) -> bool:
    pairs = zip(losses, expected, strict=True)
    return all(abs(loss / wanted - 1) <= LOSS_TOLERANCE for loss, wanted in pairs)


def measured(case: Case, provider: str) -> Usage | str:
    """The usage of a process of its own, or how that failed."""
    command = [sys.executable, __file__, json.dumps(asdict(case)), provider]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return f"failed: {last[0]}"
    return Usage(**json.loads(done.stdout.splitlines()[-1]))


def usage(case: Case, provider: str) -> Usage:
    """Measures in this process."""
    weights = initial_weights(case.architecture)
    images, labels = batch(case, classes=head_of(weights).numel())
    trainer = Trainer(case, PROVIDERS[provider], weights, images, labels)
    del weights, images
    gc.collect()
    # What building the models left, which would hide as much of the peak.
    ctypes.CDLL(None).malloc_trim(0)
    idle = resident("VmRSS") - resident("RssFile") + momentum(trainer)
    losses, peaks = [trainer.step().item()], []
    for _ in range(STEPS):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        losses.append(trainer.step().item())
        peaks.append(resident("VmHWM") - resident("RssFile") - idle)
    return Usage(idle, peaks, losses, os.environ["THP_MEM_ALLOC_ENABLE"])


def momentum(trainer: Trainer) -> float:
    """MiB of SGD's momentum, which is there from the first step on."""
    parameters = trainer.model.parameters()
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 2**20


def resident(field: str) -> float:
    """MiB; VmRSS is what the process holds now, RssFile the pages of files in that, VmHWM the most
    that it ever held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.M)[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints one provider's usage as JSON.")
    parser.add_argument("case", type=lambda text: Case(**json.loads(text)))
    parser.add_argument("provider", choices=PROVIDERS)
    arguments = parser.parse_args()
    print(json.dumps(asdict(usage(arguments.case, arguments.provider))))


if __name__ == "__main__":
    main()
