# SPDX-License-Identifier: Apache-2.0
"""Random numbers that need no state: every step begins from a seed of its own."""

from __future__ import annotations

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch's generators for a step of one process: what dropout and the blending of images
    draw there depends on (seed, step, rank) and not on what was drawn before, so that a resumed
    run draws the same."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))
