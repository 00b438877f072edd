# SPDX-License-Identifier: Apache-2.0
"""The bytes that the CUDA kernels move in a training step and an inference of ResNet-50, counted in
the emulator and held against the model of benchmarks/cuda_traffic.py.

What a kernel moves is linear in the batch, but for vectors and partial sums; so two small batches
tell a large one. Convolutions and the optimiser are not kernels of ours: theirs is the model's.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable

import pytest
import torch
import torchvision
from cuda_traffic import (
    GRAPH_READS,
    VALUE,
    Layer,
    has_graph,
    inference_bytes,
    inference_seconds,
    layers,
    training_bytes,
)
from emulator import BatchNormKernels, MaxPoolKernels, Norm

BATCH = 256
SECTOR = 32
FORMS = {"mid": "bn_relu", "last": "bn_add_relu", "dual": "bn_add_bn_relu"}


def ones(channels: int) -> Norm:
    return Norm(*(torch.ones(channels) for _ in range(4)))


def sectors(kernels: BatchNormKernels | MaxPoolKernels) -> int:
    loaded, stored = kernels.traffic
    return SECTOR * (loaded.sectors + stored.sectors)


def moved_by_batch_norm(kernels: BatchNormKernels, layer: Layer, batch: int) -> int:
    """Bytes behind an endless cache: statistics, forward and backward of one layer."""
    shape = (batch * layer.pixels, layer.channels)
    x = torch.zeros(shape, dtype=torch.bfloat16)
    kernels.stats(x)
    total = sectors(kernels)
    if layer.role in ("stem", "down"):  # applied by the pool's kernel, or by the other branch's
        return total
    residual = torch.zeros_like(x) if layer.role != "mid" else None
    residual_norm = ones(layer.channels) if layer.role == "dual" else None
    operands = (x, ones(layer.channels), residual, residual_norm)
    _, mask = kernels.forward(FORMS[layer.role], *operands)
    total += sectors(kernels)
    grads = [torch.zeros_like(x) for _ in range(2)]
    kernels.backward(
        FORMS[layer.role], grads[0], mask, *operands, True, grads[1] if layer.forks else None
    )
    return total + sectors(kernels)


def moved_beside_graphs(kernels: BatchNormKernels, layer: Layer, batch: int) -> int:
    """The same where convolutions make the sums, and the gradient in front of the ReLU where they
    can."""
    if layer.role == "down":
        return 0  # in the pass of the other branch
    shape = (batch * layer.pixels, layer.channels)
    x = torch.zeros(shape, dtype=torch.bfloat16)
    if layer.role == "stem":
        return moved_by_batch_norm(kernels, layer, batch)
    kernels.stats(x, torch.ones(2, layer.channels))
    total = sectors(kernels)
    residual = torch.zeros_like(x) if layer.role != "mid" else None
    residual_norm = ones(layer.channels) if layer.role == "dual" else None
    operands = (x, ones(layer.channels), residual, residual_norm)
    _, mask = kernels.forward(FORMS[layer.role], *operands)
    total += sectors(kernels)
    grads = [torch.zeros_like(x) for _ in range(2)]
    if not has_graph(layer):
        kernels.backward(
            FORMS[layer.role], grads[0], mask, *operands, True, grads[1] if layer.forks else None
        )
        return total + sectors(kernels)
    dual = layer.role == "dual"
    other = (residual, residual_norm) if dual else (None, None)
    kernels.backward_of_sums(
        grads[0], torch.ones(2 + dual, layer.channels), *operands[:2], *other, True
    )
    total += sectors(kernels)
    if layer.role == "mid":
        kernels.scale(operands[1])
        total += sectors(kernels)
    return total


def moved_by_stem(
    kernels: MaxPoolKernels, layer: Layer, batch: int, *, training: bool = True
) -> int:
    side = round(layer.pixels**0.5)
    x = torch.zeros(batch, side, side, layer.channels, dtype=torch.bfloat16)
    norm, windows = ones(layer.channels), (3, 2, 1)
    out, index = kernels.forward(x, norm, windows)
    total = sectors(kernels)
    if training:
        kernels.backward(out, index, x, norm, windows, True)
        total += sectors(kernels)
    return total


def scaled(count: Callable[[int], int]) -> float:
    """What ``count`` says of a batch of one and of two, for a batch of BATCH."""
    one, two = count(1), count(2)
    return one + (BATCH - 1) * (two - one)


def kernel_bytes(
    emulated: Callable[[str], ctypes.CDLL],
    moved: Callable[[BatchNormKernels, Layer, int], int],
    found: Iterable[Layer],
) -> float:
    """What our kernels move in a step, at ``moved`` bytes for the batch norm of a layer."""
    batch_norm = BatchNormKernels(emulated("bn_act"))
    max_pool = MaxPoolKernels(emulated("max_pool"))

    @functools.cache
    def counted(layer: Layer) -> float:
        total = scaled(lambda batch: moved(batch_norm, layer, batch))
        if layer.role == "stem":
            total += scaled(lambda batch: moved_by_stem(max_pool, layer, batch))
        return total

    return sum(counted(layer._replace(reads=0, weights=0)) for layer in found)


def test_resnet50_step(emulated: Callable[[str], ctypes.CDLL]) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    kernels = kernel_bytes(emulated, moved_by_batch_norm, layers(model))
    parts = training_bytes(model, BATCH)
    modelled = parts["fused"]
    ours = modelled["batch norm, ReLU, add"] + modelled["max-pool"]
    assert kernels == pytest.approx(ours, rel=0.01)
    total = sum(modelled.values()) - ours + kernels
    print(f"kernels {kernels / 1e9:.2f} GB counted, {ours / 1e9:.2f} by the model")
    print(f"a step {total / 1e9:.2f} GB with what the model says of the rest")
    # What the design of these kernels promised, and what it set out from.
    assert total == pytest.approx(86.7e9, rel=0.05)
    assert sum(parts["eager"].values()) == pytest.approx(121.8e9, rel=0.001)
    assert sum(parts["inductor"].values()) == pytest.approx(92.2e9, rel=0.001)


def test_resnet50_inference(emulated: Callable[[str], ctypes.CDLL]) -> None:
    """The stem's is the only kernel of ours in it: all else is in cuDNN's convolutions."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    max_pool = MaxPoolKernels(emulated("max_pool"))
    stem = next(layers(model))
    kernels = scaled(lambda batch: moved_by_stem(max_pool, stem, batch, training=False))
    parts = inference_bytes(model, BATCH)
    assert kernels == pytest.approx(parts["fused"]["max-pool"], rel=0.01)
    total = sum(parts["fused"].values()) - parts["fused"]["max-pool"] + kernels
    print(f"an inference {total / 1e9:.2f} GB, {kernels / 1e9:.2f} of it counted")
    assert total == pytest.approx(14.0e9, rel=0.01)
    seconds = inference_seconds(model, BATCH)
    # What the design promised of folded convolutions, and of inductor.
    assert seconds["eager"] / seconds["fused"] == pytest.approx(2.65, rel=0.01)
    assert seconds["eager"] / seconds["inductor"] == pytest.approx(1.65, rel=0.01)


def test_resnet50_step_with_graphs(emulated: Callable[[str], ctypes.CDLL]) -> None:
    """Our kernels' bytes are counted; the convolutions', and what their kernels read for the batch
    norms, are computed."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    found = list(layers(model))
    kernels = kernel_bytes(emulated, moved_beside_graphs, found)
    read = sum(
        GRAPH_READS[layer.role] * VALUE * BATCH * layer.values
        for layer in found
        if has_graph(layer)
    )
    parts = training_bytes(model, BATCH)
    modelled = parts["graphs"]
    ours = modelled["batch norm, ReLU, add"] + modelled["max-pool"] - read
    assert kernels == pytest.approx(ours, rel=0.01)
    total = sum(modelled.values()) - ours + kernels
    print(f"kernels {kernels / 1e9:.2f} GB counted, {ours / 1e9:.2f} by the model")
    print(f"a step {total / 1e9:.2f} GB with what the model says of the rest")
    assert total == pytest.approx(72.7e9, rel=0.05)
    assert total < 0.87 * sum(parts["fused"].values())
