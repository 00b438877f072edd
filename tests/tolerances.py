# SPDX-License-Identifier: Apache-2.0
"""How far from float64 a result may lie: the peer's own error is the yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

# The project's promise: no further from float64 than this many times torch's own error.
ERROR_RATIO = 1.5

# An absolute floor, in units of float32's epsilon and relative to the largest value involved. Where
# torch happens to round to the very value (sums of a few numbers, a difference that cancels), its
# error is zero or nearly so and a ratio to it says nothing; 8 roundings are what a sum of the terms
# of one formula may cost. The outputs of 16-bit operators are rounded far more coarsely than this.
FLOOR = 8 * torch.finfo(torch.float32).eps


def error(value: Tensor, exact: Tensor) -> float:
    """Root mean square distance of ``value`` from ``exact`` (float64)."""
    return (value.double() - exact).square().mean().sqrt().item()


def assert_no_worse(ours: Tensor, torchs: Tensor, exact: Tensor, what: str, scale: float) -> None:
    """``ours`` is as close to ``exact`` as ``torchs`` is, up to ERROR_RATIO and FLOOR * scale.

    Args:
        ours, torchs: the same quantity from both.
        exact: the same in float64.
        what: its name, for the message.
        scale: the size of the terms that it is a sum of.
    """
    bound = ERROR_RATIO * error(torchs, exact) + FLOOR * scale
    got = error(ours, exact)
    assert got <= bound, f"{what}: error {got:.3e} to float64, allowed {bound:.3e}"
