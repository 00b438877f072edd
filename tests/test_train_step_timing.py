# SPDX-License-Identifier: Apache-2.0
"""The comparison of two networks' steps: fair, checked, and without a trace on the networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastresnet.train.config import OptimConfig
from fastresnet.train.step_timing import format_timing, time_steps


class Network(nn.Module):
    """Two layers; ``slip`` is the relative error of a kernel that computes something else."""

    def __init__(self, slip: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, 4)
        self.slip = slip
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        features = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.fc(self.dropout(features)) * (1 + self.slip)


def run(model: nn.Module, peer: nn.Module, amp: torch.dtype | None):
    generator = torch.Generator().manual_seed(0)
    return time_steps(
        model,
        peer,
        torch.randn(8, 1, 6, 6, generator=generator),
        torch.randint(0, 4, (8,), generator=generator),
        optim=OptimConfig(),
        amp=amp,
        steps=5,
    )


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_equal_networks_agree_and_are_left_alone(amp: torch.dtype | None) -> None:
    model, peer = Network(), Network()
    before = copy.deepcopy(model.state_dict())
    timing = run(model, peer, amp)
    assert timing.outputs_agree
    # Float32 against itself, perhaps summed in another order; bfloat16 keeps 8 bits.
    low, high = (0, 1e-6) if amp is None else (1e-4, 0.05)
    assert low <= timing.error <= high
    assert low <= timing.peer_error <= high
    assert (timing.batch_size, timing.image_size, timing.steps) == (8, 6, 5)
    assert timing.speedup == timing.peer_seconds / timing.seconds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.steps == peer.steps == 0
    line = format_timing(timing, peer="torchvision")
    assert "batch 8 at 6 px, median of 5: fastresnet" in line
    assert "DIFFER" not in line


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("amp", "slip"), [(None, 1e-3), (torch.bfloat16, 0.1)])
def test_a_network_that_computes_something_else_is_named(
    amp: torch.dtype | None, slip: float, dropout: float
) -> None:
    timing = run(Network(slip, dropout), Network(dropout=dropout), amp)
    assert not timing.outputs_agree
    assert "OUTPUTS DIFFER" in format_timing(timing, peer="torchvision")


def test_the_peer_must_have_the_same_parameters() -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        run(Network(), nn.Linear(2, 2), None)
