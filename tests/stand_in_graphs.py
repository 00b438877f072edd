# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs' stand-in on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class StandIn:
    """Records by running, with every trace of that taken away again, and keeps the promises of a
    CUDA graph: recording does nothing, and a replay writes where the recorded run wrote.

    ``model`` is the network that the work runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.captured = self.replayed = 0

    def warm_up(self, work: Callable[[], object]) -> None:
        work()
        work()

    def capture(self, work: Callable[[], tuple[Tensor, ...]]):
        parameters = list(self.model.parameters())
        writes = parameters[0].grad is None
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        before = [p.grad if p.grad is None else p.grad.clone() for p in parameters]
        with torch.random.fork_rng([]):
            results = work()
        for buffer, saved in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(saved)
        static = [parameter.grad for parameter in parameters]
        for gradient, saved in zip(static, before, strict=True):
            if gradient is not None:
                gradient.copy_(torch.full_like(gradient, torch.nan) if saved is None else saved)
        for result in results:
            result.fill_(-1)
        self.captured += 1

        def replay() -> None:
            assert [p.grad for p in parameters] == static, "gradients are not where they were"
            if writes:
                self.model.zero_grad(set_to_none=True)
            for result, value in zip(results, work(), strict=True):
                result.copy_(value)
            for parameter, gradient in zip(parameters, static, strict=True):
                if gradient is not None:
                    gradient.copy_(parameter.grad)
                    parameter.grad = gradient
            self.replayed += 1

        return replay, results
