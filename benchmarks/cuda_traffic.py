# SPDX-License-Identifier: Apache-2.0
"""Bytes that one training step, or one inference, of a torchvision ResNet moves between a GPU and
its memory, by how much is fused. A model, not a measurement: every pass reads and writes each of
its tensors once, as if nothing stayed in cache from one pass to the next.
``tests/test_cuda_traffic.py`` counts what the kernels of this package really ask for and holds it
against this.

    python benchmarks/cuda_traffic.py [resnet50] [256]
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torchvision
from torch import nn

VALUE = 2  # bytes of an activation, bfloat16 or float16
MASK = 1 / 16  # a bit for each value, in units of a pass over a tensor
LEVELS = ("eager", "inductor", "fused")
# In training also: the batch norms' sums and the joins' backward in the convolutions' own kernels.
TRAINING_LEVELS = (*LEVELS, "graphs")
# Read and written by an optimiser step a parameter: float32 weight and momentum twice each, the
# gradient; the 16-bit copy of the weight and of its gradient.
OPTIMISER = 4 * 5 + 6 + 6


class Layer(NamedTuple):
    """A convolution and the batch norm behind it; sizes in values, one image."""

    role: str  # stem, mid, last (of a block), dual (last, beside a projection), down (that)
    reads: int  # of the convolution's input
    channels: int
    pixels: int
    weights: int
    forks: bool  # whether the block's output has two uses
    # Whether the convolution behind it is strided: the gradient of such a one has no graph.
    strided_behind: bool = False

    @property
    def values(self) -> int:
        return self.channels * self.pixels


def layers(model: torchvision.models.ResNet, side: int = 224) -> Iterator[Layer]:
    """Every convolution of ``model``, for images of ``side`` by ``side``."""

    def layer(conv: nn.Conv2d, role: str, side: int, forks: bool = False) -> tuple[Layer, int]:
        out = (side + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1
        # A strided 1x1 convolution leaves pixels out.
        read = out if conv.kernel_size[0] < conv.stride[0] else side
        reads, weights = conv.in_channels * read**2, conv.weight.numel()
        return Layer(role, reads, conv.out_channels, out**2, weights, forks), out

    stem, side = layer(model.conv1, "stem", side)
    yield stem
    side = (side + 1) // 2
    blocks = [block for index in range(1, 5) for block in getattr(model, f"layer{index}")]
    for block in blocks:
        forks, inner = block is not blocks[-1], side
        convs = [module for name, module in block.named_children() if name.startswith("conv")]
        for conv, behind in itertools.pairwise(convs):
            found, inner = layer(conv, "mid", inner)
            yield found._replace(strided_behind=behind.stride[0] > 1)
        role = "last" if block.downsample is None else "dual"
        next_stride = blocks[blocks.index(block) + 1].conv1.stride[0] if forks else 1
        yield layer(convs[-1], role, inner, forks)[0]._replace(strided_behind=next_stride > 1)
        if block.downsample is not None:
            yield layer(block.downsample[0], "down", side)[0]
        side = inner


# Passes over the convolution's output that batch norm, ReLU and add make, forward and backward.
# A gradient that comes from two uses is read once more by what adds it up.
_PASSES = {
    "eager": {  # batch norm 3 and 5; ReLU 2 and 3; add 3, its gradient 3
        "stem": 13,
        "mid": 13,
        "last": 16,
        "dual": 16,
        "down": 8,
    },
    "inductor": {  # a pass for the statistics; the ReLU's mask from its stored output
        "stem": 10,
        "mid": 10,
        "last": 12,
        "dual": 12,
        "down": 5,
    },
    "fused": {
        "stem": 1,  # the rest is behind a max-pool
        "mid": 3 + 5,
        # statistics; x, residual, out; both gradients and x into dz; dz and x into dx
        "last": 4 + MASK + 4 + MASK + 3,
        # and the projection's batch norm in the same passes
        "dual": 4 + MASK + 5 + MASK + 5,
        "down": 1,
    },
    "graphs": {  # the passes of our kernels; GRAPH_READS come to them
        "stem": 1,
        "mid": 2 + 3,
        "last": 3 + MASK + 3,
        "dual": 3 + MASK + 5,
        "down": 0,
    },
}
# What a convolution's kernel reads, beyond its operands, to make the gradient in front of a ReLU
# and the sums for the batch norms there: their inputs; of a join also the other gradient and the
# mask.
GRAPH_READS = {"stem": 0, "mid": 1, "last": 2 + MASK, "dual": 3 + MASK, "down": 0}


def has_graph(layer: Layer) -> bool:
    """Whether the gradient in front of the layer's ReLU is made by a graph."""
    inside = layer.role == "mid" or (layer.role in ("last", "dual") and layer.forks)
    return inside and not layer.strided_behind


def passes(level: str, layer: Layer) -> float:
    """How often one training step passes over the layer's values, beside the convolutions."""
    count = _PASSES[level][layer.role]
    if level == "graphs" and has_graph(layer):
        return count + GRAPH_READS[layer.role]
    if level == "graphs" and layer.role not in ("stem", "down"):
        count = _PASSES["fused"][layer.role] - 1  # the statistics are a graph's all the same
    if level in ("fused", "graphs") and layer.role in ("last", "dual") and not layer.forks:
        count -= 1  # the end of the network has one gradient
    return count


def training_bytes(model: torchvision.models.ResNet, batch: int) -> dict[str, dict[str, float]]:
    """Level -> part of the step -> bytes."""
    found = list(layers(model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    convolutions = 0.0
    for layer in found:
        products = 2 if layer.role == "stem" else 3  # nobody wants the images' gradient
        activations = batch * (layer.reads + layer.values)
        convolutions += products * VALUE * (activations + layer.weights)
    stem = VALUE * batch * found[0].values
    pooled = stem / 4
    result = {}
    for level in TRAINING_LEVELS:
        norms = sum(VALUE * batch * layer.values * passes(level, layer) for layer in found)
        if level in ("fused", "graphs"):
            pool = (stem + 1.5 * pooled) + 2 * (stem + 1.5 * pooled) + stem
            # The first block's input, behind the pool, is a fork of no join: its two gradients are
            # added by autograd, or by the graph that makes the second.
            gradients = pooled * (3 if level == "fused" else 1)
        else:
            index = 4 * pooled * (1 if level == "eager" else 1 / 4)
            pool = (stem + pooled + index) + (
                pooled + index + stem * (2 if level == "eager" else 1)
            )
            gradients = 0.0
            if level == "eager":
                inputs = [pooled] + [VALUE * batch * layer.values for layer in found if layer.forks]
                gradients = 3 * sum(inputs)
        result[level] = {
            "convolutions": convolutions,
            "batch norm, ReLU, add": norms,
            "max-pool": pool,
            "sums of gradients": gradients,
            "optimiser": float(OPTIMISER * parameters),
        }
    return result


# The same in inference, beyond what the convolution itself reads and writes.
_INFERENCE_PASSES = {
    "eager": {  # batch norm 2; ReLU 2; add 3
        "stem": 4,
        "mid": 4,
        "last": 7,
        "dual": 7,
        "down": 2,
    },
    "inductor": {  # batch norm, ReLU and add in a pass behind the convolution
        "stem": 2,
        "mid": 2,
        "last": 3,
        "dual": 3,
        "down": 0,
    },
    "fused": {  # all in the convolution, which reads the residual as well
        "stem": 0,
        "mid": 0,
        "last": 1,
        "dual": 1,
        "down": 0,
    },
}
# NVIDIA's figures for an H100: bytes and 16-bit operations a second.
BANDWIDTH, PEAK = 3.35e12, 800e12


def inference_bytes(model: torchvision.models.ResNet, batch: int) -> dict[str, dict[str, float]]:
    """Level -> part of the pass -> bytes. The weights are 16-bit ones; the classifier, and the
    average in front of it, are left out."""
    found = list(layers(model))
    convolutions = sum(VALUE * (batch * (x.reads + x.values) + x.weights) for x in found)
    stem = VALUE * batch * found[0].values
    pooled = stem / 4
    pool = {
        "eager": stem + pooled + 4 * pooled,  # with int64 indices
        "inductor": stem + pooled,
        "fused": stem + 1.5 * pooled,  # with a byte for each index
    }
    return {
        level: {
            "convolutions": convolutions,
            "batch norm, ReLU, add": sum(
                VALUE * batch * layer.values * passes[layer.role] for layer in found
            ),
            "max-pool": pool[level],
        }
        for level, passes in _INFERENCE_PASSES.items()
    }


def inference_seconds(model: torchvision.models.ResNet, batch: int) -> dict[str, float]:
    """Level -> the least time of an inference on an H100: each convolution as long as its bytes or
    its operations take, whichever is longer, and everything else as long as its bytes take."""
    found = list(layers(model))
    parts = inference_bytes(model, batch)
    result = {}
    for level in LEVELS:
        seconds = parts[level]["max-pool"] / BANDWIDTH
        for layer in found:
            moved = VALUE * (batch * (layer.reads + layer.values) + layer.weights)
            more = VALUE * batch * layer.values * _INFERENCE_PASSES[level][layer.role]
            operations = 2 * batch * layer.pixels * layer.weights
            if level == "fused":
                moved, more = moved + more, 0.0
            seconds += max(moved / BANDWIDTH, operations / PEAK) + more / BANDWIDTH
        result[level] = seconds
    return result


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    print(f"{name}, batch {batch}, 16-bit channels_last: GB a training step, by the model")
    for level, parts in training_bytes(model, batch).items():
        each = ", ".join(f"{part} {value / 1e9:.1f}" for part, value in parts.items())
        print(f"{level:>9} {sum(parts.values()) / 1e9:6.1f}  ({each})")
    print("GB an inference, by the model, and how many fit into an eager one on an ideal H100")
    seconds = inference_seconds(model, batch)
    for level, parts in inference_bytes(model, batch).items():
        ratio = seconds["eager"] / seconds[level]
        print(f"{level:>9} {sum(parts.values()) / 1e9:6.1f}  {ratio:.2f}")


if __name__ == "__main__":
    main()
