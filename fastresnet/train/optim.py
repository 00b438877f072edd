# SPDX-License-Identifier: Apache-2.0
"""The optimiser, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import nn

from fastresnet import optim
from fastresnet.train.config import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of the parameters that want a gradient, with weight decay on weights only
    unless ``config.decay_all``.

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
            "weight_decay": config.weight_decay if config.decay_all else 0.0,
        },
    ]
    # One kernel for all parameters' steps, on the CPU and on GPUs.
    match config.kind:
        case "sgd":
            optimizer = optim.SGD(
                groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
            )
            if config.momentum:
                # torch leaves them uninitialised where a first step is not taken, as with
                # float16's scaler while its scale is too large, and adds to them in the next.
                for parameter in parameters:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
        case "adam":
            return optim.Adam(groups, lr=config.lr, betas=config.betas)
        case "adamw":
            return optim.AdamW(groups, lr=config.lr, betas=config.betas)
        case "adagrad":
            # torch has the fused one for the CPU only.
            if all(parameter.device.type == "cpu" for parameter in parameters):
                return optim.Adagrad(groups, lr=config.lr)
            return torch.optim.Adagrad(groups, lr=config.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def schedule_factor(step: int, *, config: ScheduleConfig, steps_per_epoch: int) -> float:
    """The learning rate of a step (counted from 0) as a share of the highest; see
    :class:`fastresnet.train.config.ScheduleConfig`."""
    total_steps = config.epochs * steps_per_epoch
    if config.kind == "cyclical":
        place = step * config.cycles / total_steps % 1.0
        return config.start + (1 - config.start) * (1 - abs(2 * place - 1))
    warmup_steps = config.warmup * total_steps
    if step < warmup_steps:
        return config.start + (1 - config.start) * step / warmup_steps
    fallen = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    match config.kind:
        case "constant":
            return 1.0
        case "step":
            return config.gamma ** bisect_right(config.milestones, step // steps_per_epoch)
        case "exponential":
            return config.gamma ** (step // steps_per_epoch)
        case "cosine":
            fallen = (1 - math.cos(math.pi * fallen)) / 2
    return 1 - (1 - config.final) * fallen
