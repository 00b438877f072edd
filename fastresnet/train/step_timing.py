# SPDX-License-Identifier: Apache-2.0
"""Times the same training step on two networks that should compute the same.

The outputs are checked first; then steps alternate A B A B in one process, from the same weights,
on the same batch, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastresnet.train.config import OptimConfig
from fastresnet.train.optim import build_optimizer
from fastresnet.train.precision import autocast

_WARMUP_STEPS = 2
# Two orders of the same bfloat16 sums may land on either side of the float32 result, so ours may
# be off by somewhat more than the peer is; a wrong kernel is off by the size of the output.
_ERROR_RATIO = 2.0
_ERROR_FLOOR = 1e-4


@dataclass(frozen=True)
class StepTiming:
    """Median seconds of a training step, ours and the peer's, and how far outputs are from the
    peer's float32 output (root mean square, relative)."""

    batch_size: int
    image_size: int
    steps: int
    seconds: float
    peer_seconds: float
    error: float
    peer_error: float

    @property
    def speedup(self) -> float:
        """How many of our steps fit into one of the peer's."""
        return self.peer_seconds / self.seconds

    @property
    def outputs_agree(self) -> bool:
        """Whether ours is about as close to the float32 output as the peer is."""
        return self.error <= _ERROR_RATIO * self.peer_error + _ERROR_FLOOR


def time_steps(
    model: nn.Module,
    peer: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    optim: OptimConfig,
    amp: torch.dtype | None,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> StepTiming:
    """Times ``steps`` training steps of each network; neither is changed.

    Args:
        model, peer: networks with the same ``state_dict`` names and shapes, on one device; the
            peer is timed with the model's weights.
        images, labels: one batch, [B, C, S, S] in channels_last and [B], on that device.
        loss: of the outputs, in float32, and the labels.

    Raises:
        RuntimeError: the two do not have the same parameters and buffers.
    """
    model, peer = copy.deepcopy(model), copy.deepcopy(peer)
    peer.load_state_dict(model.state_dict())
    for network in (model, peer):
        network.to(device=images.device, memory_format=torch.channels_last)

    exact = _output(peer, images, None)
    errors = [
        ((_output(network, images, amp) - exact).norm() / exact.norm()).item()
        for network in (model, peer)
    ]
    step_functions = [
        _training_step(network, images, labels, optim, amp, loss) for network in (model, peer)
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(_WARMUP_STEPS + steps):
        for step, times in zip(step_functions, seconds, strict=True):
            begin = time.perf_counter()
            step()
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            if repeat >= _WARMUP_STEPS:
                times.append(time.perf_counter() - begin)
    return StepTiming(
        batch_size=len(images),
        image_size=images.shape[-1],
        steps=steps,
        seconds=statistics.median(seconds[0]),
        peer_seconds=statistics.median(seconds[1]),
        error=errors[0],
        peer_error=errors[1],
    )


def format_timing(timing: StepTiming, *, peer: str) -> str:
    """The line that the comparison prints."""
    line = (
        f"training step, batch {timing.batch_size} at {timing.image_size} px, median of "
        f"{timing.steps}: fastresnet {1e3 * timing.seconds:.0f} ms, "
        f"{peer} {1e3 * timing.peer_seconds:.0f} ms, {timing.speedup:.2f} times as fast"
    )
    if timing.outputs_agree:
        return line
    return (
        f"{line}; OUTPUTS DIFFER: error {timing.error:.2e} against {peer}'s {timing.peer_error:.2e}"
    )


@torch.no_grad()
def _output(network: nn.Module, images: Tensor, amp: torch.dtype | None) -> Tensor:
    # In training mode, on a copy: batch statistics are part of the step, running ones would move.
    network = copy.deepcopy(network).train()
    # Two draws of dropout would be further apart than any two kernels.
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    with autocast(amp, images.device):
        return network(images).float()


def _training_step(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    optim: OptimConfig,
    amp: torch.dtype | None,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[], None]:
    network.train()
    optimizer = build_optimizer(network, optim)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(amp, images.device):
            value = loss(network(images).float(), labels)
        value.backward()
        optimizer.step()

    return step
