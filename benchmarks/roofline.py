# SPDX-License-Identifier: Apache-2.0
"""How fast this machine multiplies and moves memory, measured by what torch itself does best:
`python benchmarks/roofline.py`.

The multiplying is `torch.mm` on square matrices, the best of several sizes: what a tuned library
reaches, not the processor's theoretical peak, so that a kernel may come out above it. The moving is
large copies (bytes read and written) and sums (bytes read), far beyond the caches; work whose
tensors stay in a cache between two rounds may come out above that too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

DTYPES = ("bfloat16", "float32")
SIDES = (1024, 2048, 3072)
STREAM_BYTES = 512 * 2**20
REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """The fastest of what was tried, and its name."""

    name: str
    rate: float  # GFLOP/s or GB/s


@dataclass(frozen=True)
class Roofline:
    """multiply: GFLOP/s for each storage dtype. bandwidth: GB/s of the faster stream."""

    multiply: dict[str, Peak]
    bandwidth: Peak

    def floor(self, dtype: str, *, flops: float, nbytes: float) -> float:
        """The least seconds for so much work: the longer of multiplying it and moving it."""
        return max(flops / self.multiply[dtype].rate, nbytes / self.bandwidth.rate) / 1e9

    def facts(self, dtype: str) -> dict[str, Any]:
        """What the floors of a dtype rest on, for the row."""
        return {"multiply": asdict(self.multiply[dtype]), "bandwidth": asdict(self.bandwidth)}


def measure(
    sides: tuple[int, ...] = SIDES, stream_bytes: int = STREAM_BYTES, repeats: int = REPEATS
) -> Roofline:
    """Measures on the CPU, with torch's current number of threads.

    Args:
        sides: of the matrices to multiply.
        stream_bytes: size of each tensor to copy and to sum.
        repeats: how often each is done; the fastest counts, as a limit is what can be reached.
    """
    products = {dtype: _multiply(dtype, sides, repeats) for dtype in DTYPES}
    # Nothing forbids float32 products of what is stored in 16 bits.
    best = max(products.values(), key=lambda peak: peak.rate)
    streams = (_copy(stream_bytes, repeats), _sum(stream_bytes, repeats))
    return Roofline(
        multiply={"bfloat16": best, "float32": products["float32"]},
        bandwidth=max(streams, key=lambda peak: peak.rate),
    )


def _multiply(dtype: str, sides: tuple[int, ...], repeats: int) -> Peak:
    peaks = []
    for side in sides:
        a, b, out = (torch.randn(side, side).to(getattr(torch, dtype)) for _ in range(3))
        seconds = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), repeats)
        peaks.append(Peak(f"torch.mm {dtype} {side}", 2 * side**3 / seconds / 1e9))
    return max(peaks, key=lambda peak: peak.rate)


def _copy(nbytes: int, repeats: int) -> Peak:
    source, target = (torch.ones(nbytes // 4) for _ in range(2))
    return Peak("copy", 2 * nbytes / _fastest(lambda: target.copy_(source), repeats) / 1e9)


def _sum(nbytes: int, repeats: int) -> Peak:
    source = torch.ones(nbytes // 4)
    return Peak("sum", nbytes / _fastest(source.sum, repeats) / 1e9)


def _fastest(work: Callable[[], Any], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    roofline = measure()
    for dtype, peak in roofline.multiply.items():
        print(f"{dtype:9} {peak.rate:8.1f} GFLOP/s  {peak.name}")
    print(f"{'memory':9} {roofline.bandwidth.rate:8.1f} GB/s     {roofline.bandwidth.name}")


if __name__ == "__main__":
    main()
