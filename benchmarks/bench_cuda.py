# SPDX-License-Identifier: Apache-2.0
"""Training steps and inferences on a GPU, timed by CUDA events; images per second.

Never run to an end so far. `FASTRESNET_REQUIRE_CUDA=1 pytest benchmarks/bench_cuda.py` fails
without a GPU, and does not skip. A network recorded in a CUDA graph keeps the memory of a step to
itself, so large batches are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import pytest
import torch
import torchvision
from bench_train_step import FLOAT64_PIXELS, forward_backward
from clocks import Clock, clock_of
from harness import Comparison
from providers import ModelProvider, build, head_of, initial_weights, without_dropout
from torch import Tensor, nn
from torch.nn import functional as F

from fastresnet import models
from fastresnet.ops import choice
from fastresnet.train.graph import CapturedBackward, CudaGraphs, Graphs

pytestmark = pytest.mark.needs_cuda
DEVICE = "cuda"


@dataclass(frozen=True)
class GpuProvider(ModelProvider):
    """graphed: recorded in a CUDA graph by us, forward and backward, and replayed.
    conv_graphs: of fastresnet's training, with cuDNN's graphs where they were timed faster.
    """

    graphed: bool = False
    conv_graphs: bool = True


PROVIDERS = (
    GpuProvider("torchvision", "baseline", torchvision.models),
    GpuProvider("torchvision, CUDA graph", "peer", torchvision.models, graphed=True),
    GpuProvider("torch.compile", "peer", torchvision.models, compiled=True),
    GpuProvider(
        "torch.compile, CUDA graph",
        "peer",
        torchvision.models,
        compiled=True,
        compile_mode="reduce-overhead",
        graphed=True,
    ),
    GpuProvider("fastresnet, torch's convolutions", "ours", models, conv_graphs=False),
    GpuProvider("fastresnet", "ours", models),
    GpuProvider("fastresnet, CUDA graph", "ours", models, graphed=True),
    GpuProvider("stock torchvision", "context", torchvision.models, stock=True),
)


@dataclass(frozen=True)
class Case:
    """16-bit dtypes mean autocast over float32 parameters. graphs: with the recorded providers."""

    architecture: str
    side: int
    batch: int
    dtype: str
    bar: float = 1.0
    graphs: bool = False

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.side}-b{self.batch}-{self.dtype}"

    @property
    def truth_dtype(self) -> torch.dtype:
        large = self.batch * self.side**2 > FLOAT64_PIXELS
        return torch.float32 if large and self.dtype != "float32" else torch.float64

    @property
    def providers(self) -> tuple[GpuProvider, ...]:
        return tuple(p for p in PROVIDERS if self.graphs or not p.graphed)


TRAINING = (
    Case("resnet50", 224, 256, "bfloat16"),
    Case("resnet50", 224, 32, "bfloat16", graphs=True),
    Case("resnet18", 224, 256, "bfloat16"),
    Case("cifar_resnet18", 32, 128, "bfloat16", graphs=True),
    Case("resnet50", 224, 32, "float32", graphs=True),
)
INFERENCE = (
    Case("resnet50", 224, 256, "bfloat16"),
    Case("resnet50", 224, 256, "float16"),
    Case("resnet50", 224, 1, "float16", graphs=True),
    Case("resnet18", 224, 32, "bfloat16", graphs=True),
    Case("vgg16_bn", 224, 32, "bfloat16", graphs=True),
)


@pytest.fixture(autouse=True)
def _fastest_convolutions() -> Iterator[None]:
    """cuDNN's choice by timing, for every provider."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        yield


@pytest.mark.parametrize("case", TRAINING, ids=lambda case: case.name)
def test_train_step(case: Case, run: Callable[[Comparison], None]) -> None:
    run(compare(case, "cuda_train_step", TrainingStep))


@pytest.mark.parametrize("case", INFERENCE, ids=lambda case: case.name)
def test_inference(case: Case, run: Callable[[Comparison], None]) -> None:
    run(compare(case, "cuda_inference", Inference))


def compare(
    case: Case,
    suite: str,
    work: type[TrainingStep] | type[Inference],
    *,
    device: str = DEVICE,
    clock: Clock | None = None,
    providers: tuple[GpuProvider, ...] | None = None,
    graphs: Callable[[nn.Module], Graphs] | None = None,
) -> Comparison:
    """The checked comparison of a case; the last four arguments are for machines without a GPU."""
    if providers is None:  # inference has but one way
        training = work is TrainingStep
        providers = tuple(p for p in case.providers if training or p.conv_graphs)
    graphs = graphs or (lambda _: CudaGraphs(torch.device(device)))
    if any(provider.compiled for provider in providers):
        torch.compiler.reset()
    comparison = Comparison(
        suite,
        case.name,
        metric="images_per_second",
        unit="images/s",
        work=case.batch,
        config=asdict(case) | {"truth": str(case.truth_dtype).removeprefix("torch.")},
        bar=case.bar,
        device=device,
        clock=clock or clock_of(device),
    )
    weights = initial_weights(case.architecture)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.side, case.side, generator=generator).to(device)
    classes = head_of(weights).numel()
    labels = torch.randint(classes, (case.batch,), generator=generator).to(device)
    for provider in providers:
        runner = work(case, provider, weights, images, labels, graphs)
        comparison.add(provider.name, runner.step, runner.results, role=provider.role)
    comparison.check(truth(case, work, weights, images, labels))
    return comparison


class _Runner:
    """A provider's model on a batch that stays the same."""

    def __init__(
        self,
        case: Case,
        provider: GpuProvider,
        weights: dict[str, Tensor],
        images: Tensor,
        labels: Tensor,
        graphs: Callable[[nn.Module], Graphs],
    ) -> None:
        self.device = images.device
        self.model = provider.model(case.architecture, weights, self.device)
        self.images = images.contiguous(memory_format=provider.memory_format)
        self.labels = labels
        self.dtype = torch.float32 if provider.stock else getattr(torch, case.dtype)
        # What torch.compile records by itself needs nothing of ours.
        self.policy = "timed" if provider.conv_graphs else "never"
        self.records = provider.graphed and not provider.compiled
        self.graphs = graphs(self.model) if self.records else None

    def autocast(self) -> AbstractContextManager:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)


class TrainingStep(_Runner):
    """Forward, loss, backward, SGD with momentum."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3, momentum=0.9, fused=True)
        self.recorded = (
            CapturedBackward(self.backward, self.model, self.graphs) if self.records else None
        )

    def step(self) -> Tensor:
        """Takes a step, and returns the loss that it began with."""
        loss, _ = self._forward_backward()
        self.optimizer.step()
        return loss

    def results(self) -> dict[str, Tensor]:
        """Logits and gradient of the first step, which is not taken."""
        _, logits = self._forward_backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        return {"logits": logits.clone(), "gradient": gradient}

    def _forward_backward(self) -> tuple[Tensor, Tensor]:
        before, choice.policy = choice.policy, self.policy
        try:
            return self._as_recorded()
        finally:
            choice.policy = before

    def _as_recorded(self) -> tuple[Tensor, Tensor]:
        if self.recorded is not None:
            return self.recorded(self.images, self.labels, count=1, first=True)
        self.optimizer.zero_grad(set_to_none=True)
        return self.backward(self.images, self.labels)

    def backward(self, images: Tensor, labels: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        return loss.detach(), logits.detach()


class Inference(_Runner):
    """The logits of a batch."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.model.eval()
        self.replay: Callable[[], None] | None = None

    @torch.no_grad()
    def step(self) -> Tensor:
        if not self.records:
            return self._logits()
        if self.replay is None:
            self.graphs.warm_up(self._logits)
            self.replay, (self.logits,) = self.graphs.capture(lambda: (self._logits(),))
        self.replay()
        return self.logits

    def results(self) -> dict[str, Tensor]:
        return {"logits": self.step().clone()}

    def _logits(self) -> Tensor:
        with self.autocast():
            return self.model(self.images)


def truth(
    case: Case,
    work: type[TrainingStep] | type[Inference],
    weights: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
) -> Mapping[str, Tensor]:
    """What torchvision's model computes in float64, or in float32 (see `Case.truth_dtype`)."""
    model = build(torchvision.models, case.architecture).to(case.truth_dtype)
    model.load_state_dict(weights)
    model = without_dropout(model.train(work is TrainingStep)).to(images.device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        if work is TrainingStep:
            return forward_backward(model, images.to(case.truth_dtype), labels)
        with torch.no_grad():
            return {"logits": model(images.to(case.truth_dtype))}
