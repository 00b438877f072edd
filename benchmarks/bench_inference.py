# SPDX-License-Identifier: Apache-2.0
"""A whole inference: float images in, logits out; images per second.

`--scaling` adds every factory at three sizes, and resnet18 and resnet50 along the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial

import pytest
import torch
import torchvision
from bench_train_step import Case, batch
from clocks import Clock, TurnClock
from harness import Comparison, relative_errors
from providers import FACTORIES, MODEL_PROVIDERS, ModelProvider, build, weights_in_use
from runtimes import RUNTIMES, Infer, Runtime, versions
from torch import Tensor
from torch._inductor import config as inductor

# Compiled, ours fold nothing: our kernels for inference run in eager mode only.
PROVIDERS = tuple(p for p in MODEL_PROVIDERS if not (p.role == "ours" and p.compiled))
STOCK = next(provider for provider in PROVIDERS if provider.stock)
TRUTH_BATCH = 4  # in float64 at a time: torch's convolutions there unfold all that they are given

CASES = (
    Case("resnet50", 224, 16, "bfloat16"),
    Case("resnet50", 224, 1, "bfloat16"),
    Case("resnet18", 224, 16, "bfloat16"),
    Case("cifar_resnet18", 32, 128, "bfloat16"),
    Case("resnet50", 224, 16, "float32"),
    Case("resnet50", 224, 1, "float32"),
    Case("resnet18", 224, 16, "float32"),
    Case("cifar_resnet18", 32, 128, "float32"),
)


def scaling_cases() -> list[Case]:
    """Those not in CASES, each once."""
    sizes = [(name, *size) for name in FACTORIES for size in ((224, 16), (64, 64), (512, 1))]
    sizes += [(name, 224, n) for name in ("resnet18", "resnet50") for n in (1, 2, 4, 8, 32, 64)]
    cases = [Case(*size, dtype) for dtype in ("bfloat16", "float32") for size in sizes]
    return [case for case in dict.fromkeys(cases) if case not in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inference(case: Case, run: Callable[[Comparison], None]) -> None:
    run(compare(case, "inference"))


@pytest.mark.scaling
@pytest.mark.parametrize("case", scaling_cases(), ids=lambda case: case.name)
def test_scaling(case: Case, run: Callable[[Comparison], None]) -> None:
    run(compare(case, "inference_scaling"))


def compare(
    case: Case,
    suite: str,
    *,
    providers: tuple[ModelProvider, ...] = PROVIDERS,
    runtimes: tuple[Runtime, ...] = RUNTIMES,
    clock: Clock | None = None,
) -> Comparison:
    """The checked comparison of a case."""
    if any(provider.compiled for provider in providers):
        torch.compiler.reset()
    runtimes = tuple(runtime for runtime in runtimes if case.dtype in runtime.dtypes)
    comparison = Comparison(
        suite,
        case.name,
        metric="images_per_second",
        unit="images/s",
        work=case.batch,
        config=asdict(case) | {"truth": "float64", "runtimes": versions() if runtimes else {}},
        bar=case.bar,
        clock=clock or TurnClock(),
    )
    weights = weights_in_use(case.architecture, side=min(case.side, 64))
    images = images_of(case)
    loads = [(p.name, p.role, partial(load_torch, p)) for p in providers]
    loads += [(r.name, "peer", partial(load_runtime, r)) for r in runtimes]
    for name, role, load in loads:
        inference = Inference(partial(load, case, weights, images))
        comparison.add(name, inference.step, inference.results, role=role)
    comparison.check(
        {"logits": truth(case, weights, images)},
        # Peers that fold batch norms have up to 1.5 times the baseline's error in float32. A batch
        # on which it is lucky must not keep the fastest of them out.
        elsewhere=lambda: {"logits": largest_error(case, providers[0], weights)},
    )
    return comparison


class Inference:
    """Of a batch that stays the same. The model is loaded by the check, which records what is
    missing for that."""

    def __init__(self, load: Callable[[], Infer]) -> None:
        self._load = load

    @cached_property
    def _infer(self) -> Infer:
        return self._load()

    def step(self) -> Tensor:
        return self._infer()

    def results(self) -> dict[str, Tensor]:
        return {"logits": self._infer()}


def load_torch(
    provider: ModelProvider, case: Case, weights: Mapping[str, Tensor], images: Tensor
) -> Infer:
    model = provider.model(case.architecture, weights).eval()
    images = images.contiguous(memory_format=provider.memory_format)
    low_precision = case.dtype == "bfloat16" and not provider.stock

    def infer() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            return model(images)

    # The first call compiles. Frozen, weights are constants: folded, cast and laid out beforehand.
    with inductor.patch(freezing=provider.compiled):
        infer()
    return infer


def load_runtime(
    runtime: Runtime, case: Case, weights: Mapping[str, Tensor], images: Tensor
) -> Infer:
    model = STOCK.model(case.architecture, weights).eval()
    return runtime.load(model, images, case.dtype)


@torch.no_grad()
def truth(case: Case, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The logits by torchvision's model in float64."""
    model = build(torchvision.models, case.architecture).double().eval()
    model.load_state_dict(weights)
    return torch.cat([model(part) for part in images.double().split(TRUTH_BATCH)])


def largest_error(
    case: Case, provider: ModelProvider, weights: Mapping[str, Tensor], batches: int = 5
) -> float:
    """A provider's, over other batches."""
    errors = []
    for seed in range(2, 2 + batches):
        images = images_of(case, seed=seed)
        logits = load_torch(provider, case, weights, images)()
        exact = truth(case, weights, images)
        errors.append(relative_errors({"logits": logits}, {"logits": exact})["logits"])
    return max(errors)


def images_of(case: Case, seed: int = 1) -> Tensor:
    images, _ = batch(case, classes=1, seed=seed)
    return images
