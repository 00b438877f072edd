# SPDX-License-Identifier: Apache-2.0
"""A whole training step: forward, loss, backward, SGD with momentum; images per second.

`--scaling` adds every factory at three sizes, and resnet18 and resnet50 along batch, side and
threads, one at a time from batch 16 at 224 px on two threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain

import pytest
import torch
import torchvision
from harness import Comparison, relative_errors
from providers import (
    FACTORIES,
    MODEL_PROVIDERS,
    ModelProvider,
    build,
    head_of,
    initial_weights,
    without_dropout,
)
from torch import nn
from torch.nn import functional as F

# Above so many pixels a batch, float64 takes minutes and more memory than a machine may have.
FLOAT64_PIXELS = 4 * 512**2


@dataclass(frozen=True)
class Case:
    """bfloat16 means autocast over float32 parameters, as people train. threads: None for as many
    as torch chooses."""

    architecture: str
    side: int
    batch: int
    dtype: str
    bar: float = 1.0
    threads: int | None = None

    @property
    def name(self) -> str:
        threads = f"-t{self.threads}" if self.threads else ""
        return f"{self.architecture}-{self.side}-b{self.batch}-{self.dtype}{threads}"

    @property
    def truth_dtype(self) -> torch.dtype:
        """What the results are checked against. Float32 is as good as float64 beside bfloat16."""
        large = self.batch * self.side**2 > FLOAT64_PIXELS
        return torch.float32 if large and self.dtype == "bfloat16" else torch.float64


CASES = (
    Case("resnet50", 224, 16, "bfloat16", bar=2.3),
    Case("resnet18", 224, 16, "bfloat16", bar=1.9),
    Case("cifar_resnet18", 32, 128, "bfloat16", bar=1.8),
    Case("resnet50", 512, 4, "bfloat16", bar=2.2),
    Case("resnet50", 224, 16, "float32", bar=1.25),
    Case("resnet18", 224, 16, "float32"),
    Case("cifar_resnet18", 32, 128, "float32"),
)


def scaling_cases() -> Iterator[Case]:
    """Those not in CASES, each once."""
    seen = {case.name for case in CASES}
    for case in chain.from_iterable(_scaling_cases(dtype) for dtype in ("bfloat16", "float32")):
        if case.name not in seen:
            seen.add(case.name)
            yield case


def _scaling_cases(dtype: str) -> Iterator[Case]:
    for factory in FACTORIES:
        # The middle, and the two ends of what a batch may be.
        for side, batch in ((224, 16), (64, 64), (512, 1)):
            yield Case(factory, side, batch, dtype)
    for factory in ("resnet18", "resnet50"):
        for batch in (1, 2, 4, 8, 32, 64):
            yield Case(factory, 224, batch, dtype)
        for side in (32, 64, 96, 128, 320):
            yield Case(factory, side, 16, dtype)
        for threads in (1, 2):
            yield Case(factory, 224, 16, dtype, threads=threads)
    for side, batch in ((32, 1), (32, 16), (32, 64), (64, 64)):
        yield Case("cifar_resnet18", side, batch, dtype)
    yield Case("cifar_resnet18", 32, 128, dtype, threads=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_train_step(case: Case, run: Callable[[Comparison], None]) -> None:
    run(compare(case, "train_step"))


@pytest.mark.scaling
@pytest.mark.parametrize("case", list(scaling_cases()), ids=lambda case: case.name)
def test_scaling(case: Case, run: Callable[[Comparison], None]) -> None:
    with threads(case.threads):
        # Deep networks without quiet branches (VGG), and tiny batches, have gradients in bfloat16
        # that are nowhere near float64, torchvision's own included: there the logits must do.
        run(compare(case, "train_scaling", partial=True))


def compare(
    case: Case,
    suite: str,
    *,
    providers: tuple[ModelProvider, ...] = MODEL_PROVIDERS,
    partial: bool = False,
) -> Comparison:
    """The checked comparison of a case."""
    if any(provider.compiled for provider in providers):
        # Past eight networks dynamo would give up compiling, and run the rest in eager mode.
        torch.compiler.reset()
    truth_dtype = str(case.truth_dtype).removeprefix("torch.")
    comparison = Comparison(
        suite,
        case.name,
        metric="images_per_second",
        unit="images/s",
        work=case.batch,
        config=asdict(case) | {"truth": truth_dtype},
        bar=case.bar,
    )
    weights = initial_weights(case.architecture)
    images, labels = batch(case, classes=head_of(weights).numel())
    for provider in providers:
        trainer = Trainer(case, provider, weights, images, labels)
        comparison.add(provider.name, trainer.step, trainer.results, role=provider.role)
    comparison.check(
        truth(case, weights, images, labels),
        partial=partial,
        elsewhere=lambda: largest_errors(case, providers[0], weights),
    )
    return comparison


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        self.optimizer = provider.optimizer(self.model)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.low_precision)

    def step(self) -> torch.Tensor:
        """Takes a step, and returns the loss that it began with."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

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
    """The same in float64 (or float32, see `Case.truth_dtype`), by torchvision's model."""
    model = build(torchvision.models, case.architecture).to(case.truth_dtype)
    model.load_state_dict(weights)
    return forward_backward(without_dropout(model.train()), images.to(case.truth_dtype), labels)


def largest_errors(
    case: Case, provider: ModelProvider, weights: dict[str, torch.Tensor], batches: int = 5
) -> dict[str, float]:
    """A provider's, over other batches. Where maps are small, a ReLU that a rounding turns around
    is felt: torchvision's ResNet-50 at 32 px in float32 is 3e-6 to 7e-3 from float64, batch by
    batch."""
    largest: dict[str, float] = {}
    for seed in range(2, 2 + batches):
        images, labels = batch(case, classes=head_of(weights).numel(), seed=seed)
        results = Trainer(case, provider, weights, images, labels).results()
        errors = relative_errors(results, truth(case, weights, images, labels))
        largest = {name: max(value, largest.get(name, 0.0)) for name, value in errors.items()}
    return largest


def batch(case: Case, classes: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(case.batch, 3, case.side, case.side, generator=generator)
    return images, torch.randint(classes, (case.batch,), generator=generator)
