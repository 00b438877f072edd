# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes and what bounds each part: writes docs/profile.md.

`python benchmarks/profile_step.py`: ResNet-50 at 224 px, batch 16, bfloat16 autocast, under torch's
profiler, ours and torchvision's in channels_last; the floors are those of roofline.py, measured in
the same run.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in harness.py

import roofline
import torch
import torchvision
from bench_train_step import Case, Trainer, batch
from harness import machine
from layers import Layer, conv_layers
from providers import MODEL_PROVIDERS, ModelProvider, initial_weights
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

CASE = Case("resnet50", 224, 16, "bfloat16")
STEPS = 5
OUTPUT = Path(__file__).parent.parent / "docs" / "profile.md"

# Which operators make up a part, the first prefix that fits.
PARTS = {
    "convolutions, forward": ("fastresnet::conv_stats",),
    "convolutions, backward": ("fastresnet::conv_bn_backward",),
    "ends of the blocks": ("fastresnet::bn_add", "fastresnet::bn_sums"),
    "stem behind its convolution": ("fastresnet::",),
    "torch's convolutions": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "torch's batch norm": (
        "aten::native_batch_norm",
        "aten::batch_norm",
        "aten::_batch_norm",
        "aten::cudnn_batch_norm",
    ),
    "ReLU": ("aten::relu", "aten::clamp_min", "aten::threshold_backward"),
    "sums of branches": ("aten::add",),
    "max-pool": ("aten::max_pool",),
}
REST = "the rest"
OPTIMISER = "optimiser", "Optimizer.step"  # with all that runs within its step


class Work(NamedTuple):
    """What a part cannot do without: each tensor of it read or written once."""

    flops: float
    nbytes: float


def measure(provider: ModelProvider) -> dict[str, float]:
    """Milliseconds of each part of a step, and of all of it."""
    weights = initial_weights(CASE.architecture)
    images, labels = batch(CASE, classes=weights["fc.bias"].numel())
    trainer = Trainer(CASE, provider, weights, images, labels)
    for _ in range(2):
        trainer.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            trainer.step()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        found[part_of(event)] += event.self_cpu_time_total / 1e3 / STEPS
    return dict(found)


def part_of(event: FunctionEvent) -> str:
    part, step = OPTIMISER
    around: FunctionEvent | None = event
    while around is not None:
        if around.name.startswith(step):
            return part
        around = around.cpu_parent
    for part, prefixes in PARTS.items():
        if event.name.startswith(prefixes):
            return part
    return REST


def least_work() -> dict[str, Work]:
    """The parts of ours whose work is countable."""
    layers = conv_layers(CASE.architecture, CASE.side)
    forward, backward, ends = (Work(0, 0) for _ in range(3))
    for layer, count in layers.items():
        flops = 2 * pixels(layer) * layer.out_channels * layer.channels * layer.kernel**2
        x = 2 * CASE.batch * layer.side**2 * layer.channels
        y = 2 * pixels(layer) * layer.out_channels
        weight = 4 * layer.channels * layer.out_channels * layer.kernel**2
        forward = add(forward, count, flops, x + y + weight)
        # The gradient behind y, y and x are read, x's gradient is written; the weight is read and
        # its gradient written.
        backward = add(backward, count, 2 * flops, 2 * y + 2 * x + 2 * weight)
        if layer.position in ("last", "shortcut"):
            # Both branches read and the block's output written; the gradient and y read for the
            # sums.
            ends = add(ends, count, 0, 2 * y + 2 * y)
    # The stem's, of images that have no gradient.
    outputs, patch = 64 * CASE.batch * (CASE.side // 2) ** 2, 3 * 7**2
    flops = 2 * outputs * patch
    images, y, weight = 2 * 3 * CASE.batch * CASE.side**2, 2 * outputs, 4 * 64 * patch
    forward = add(forward, 1, flops, images + y + weight)
    backward = add(backward, 1, flops, images + 2 * y + weight)
    names = list(PARTS)[:3]
    return dict(zip(names, (forward, backward, ends), strict=True))


def pixels(layer: Layer) -> int:
    return CASE.batch * layer.out_side**2


def add(work: Work, count: int, flops: float, nbytes: float) -> Work:
    return Work(work.flops + count * flops, work.nbytes + count * nbytes)


def table(times: dict[str, float], work: dict[str, Work], limits: roofline.Roofline) -> list[str]:
    """Markdown rows, largest part first."""
    lines = [
        "| part | ms | share | GFLOP/s | GB/s | least ms | bound by |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    total = sum(times.values())
    for part, milliseconds in sorted(times.items(), key=lambda item: -item[1]):
        cells = [part, f"{milliseconds:.0f}", f"{milliseconds / total:.0%}"]
        if part in work:
            flops, nbytes = work[part]
            multiply = flops / limits.multiply[CASE.dtype].rate / 1e6
            move = nbytes / limits.bandwidth.rate / 1e6
            cells += [f"{flops / milliseconds / 1e6:.0f}" if flops else ""]
            cells += [f"{nbytes / milliseconds / 1e6:.0f}", f"{max(multiply, move):.0f}"]
            cells += ["multiplying" if multiply > move else "memory"]
        else:
            cells += [""] * 4
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| all | {total:.0f} | | | | | |")
    return lines


def main() -> None:
    limits = roofline.measure()
    facts = machine("cpu")
    providers = {provider.name: provider for provider in MODEL_PROVIDERS}
    multiply = limits.multiply[CASE.dtype]
    lines = [
        "# Where a training step's time goes",
        "",
        "Written by `benchmarks/profile_step.py`: ResNet-50, 224 px, batch 16, bfloat16 autocast, "
        f"{STEPS} steps under torch's profiler (which adds a few per cent). {facts['cpu']}, "
        f"{facts['threads']} threads, {facts['isa']}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, revision {facts['git']}.",
        "",
        f"Measured in the same run: {multiply.rate:.0f} GFLOP/s ({multiply.name}), "
        f'{limits.bandwidth.rate:.0f} GB/s ({limits.bandwidth.name}). "Least ms" is what a part '
        "would take at the slower of the two, each of its tensors moved once.",
        "",
        "## fastresnet",
        "",
        *table(measure(providers["fastresnet"]), least_work(), limits),
        "",
        "## torchvision, channels_last",
        "",
        *table(measure(providers["torchvision"]), {}, limits),
        "",
    ]
    OUTPUT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
