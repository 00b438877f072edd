# SPDX-License-Identifier: Apache-2.0
"""A whole training step: forward, loss, backward, SGD with momentum; images per second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import pytest
import torch
import torchvision
from harness import Comparison
from providers import MODEL_PROVIDERS, ModelProvider, build, initial_weights
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """bfloat16 means autocast over float32 parameters, as people train."""

    architecture: str
    side: int
    batch: int
    dtype: str
    bar: float | None = None

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.side}-b{self.batch}-{self.dtype}"


CASES = (
    Case("resnet50", 224, 16, "bfloat16", bar=1.25),
    Case("resnet18", 224, 16, "bfloat16"),
    Case("cifar_resnet18", 32, 128, "bfloat16"),
    Case("resnet50", 224, 16, "float32"),
    Case("resnet18", 224, 16, "float32"),
    Case("cifar_resnet18", 32, 128, "float32"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_train_step(case: Case, run: Callable[[Comparison], None]) -> None:
    comparison = Comparison(
        "train_step",
        case.name,
        metric="images_per_second",
        unit="images/s",
        work=case.batch,
        config=asdict(case),
        bar=case.bar,
    )
    weights = initial_weights(case.architecture)
    images, labels = batch(case, classes=weights["fc.bias"].numel())
    for provider in MODEL_PROVIDERS:
        trainer = Trainer(case, provider, weights, images, labels)
        comparison.add(provider.name, trainer.step, trainer.results, role=provider.role)
    comparison.check(truth(case, weights, images, labels))
    run(comparison)


class Trainer:
    """A provider's model with its optimiser, on a batch that stays the same."""

    def __init__(
        self,
        case: Case,
        provider: ModelProvider,
        weights: dict[str, torch.Tensor],
        images: torch.Tensor,
        labels: torch.Tensor,
    ) -> None:
        self.model = provider.model(case.architecture, weights)
        self.images = images.contiguous(memory_format=provider.memory_format)
        self.labels = labels
        self.low_precision = case.dtype == "bfloat16" and not provider.stock
        # fused is the fastest of torch's three, for every provider.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.low_precision)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    def results(self) -> dict[str, torch.Tensor]:
        """Logits and gradient of the first step, which is not taken."""
        with self._autocast():
            return forward_backward(self.model, self.images, self.labels)


def forward_backward(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The logits, and the gradient of every parameter in one vector."""
    logits = model(images)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
    vector = torch.cat([gradient.flatten() for gradient in gradients])
    return {"logits": logits.detach(), "gradient": vector}


def truth(
    case: Case, weights: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    """The same in float64, by torchvision's model."""
    model = build(torchvision.models, case.architecture).double()
    model.load_state_dict(weights)
    return forward_backward(model.train(), images.double(), labels)


def batch(case: Case, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.side, case.side, generator=generator)
    return images, torch.randint(classes, (case.batch,), generator=generator)
