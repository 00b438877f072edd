# SPDX-License-Identifier: Apache-2.0
"""The optimisers that a recipe names."""

from __future__ import annotations

import math

import torch

from fastresnet.train.config import OptimConfig
from fastresnet.train.optim import build_optimizer


def test_a_skipped_first_step_leaves_no_trace() -> None:
    """As float16's scaler skips it when a gradient has overflowed."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, nesterov=False, weight_decay=0))
    before = model.weight.detach().clone()
    # What is not initialised is NaN then, rather than by chance zero.
    torch.use_deterministic_algorithms(True)
    try:
        for gradient in (math.inf, 1.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(gradient > 1))
            optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(model.weight.detach(), before - 0.1)
