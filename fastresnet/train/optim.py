# SPDX-License-Identifier: Apache-2.0
"""The optimiser, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastresnet.train.config import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """SGD with momentum, with weight decay on weights only.

    Biases and the weights of normalisation layers are the parameters of one dimension: decaying
    them gives nothing against overfitting and shrinks the scale that the next layer sees.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.ndim <= 1],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, *, total_steps: int
) -> LambdaLR:
    """The schedule; call ``step()`` after each of the optimiser's ``total_steps``."""
    return LambdaLR(optimizer, partial(schedule_factor, config=config, total_steps=total_steps))


def schedule_factor(step: int, *, config: ScheduleConfig, total_steps: int) -> float:
    """The learning rate of a step (counted from 0) as a share of the highest.

    It rises in a line from ``start`` to 1 over the warm-up, then falls to ``final``: in a line
    (one-cycle), along half a cosine, or not at all (constant).
    """
    warmup_steps = config.warmup * total_steps
    if step < warmup_steps:
        return config.start + (1 - config.start) * step / warmup_steps
    fallen = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    match config.kind:
        case "constant":
            return 1.0
        case "cosine":
            fallen = (1 - math.cos(math.pi * fallen)) / 2
    return 1 - (1 - config.final) * fallen
