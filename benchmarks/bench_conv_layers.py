# SPDX-License-Identifier: Apache-2.0
"""Each distinct convolution of a ResNet's blocks with what surrounds it in training, forward and
backward: ours in one pass, beside torch's separate operators.

One link of a block is timed, so that the links' times add up to the blocks' for both sides:

- forward: batch norm and ReLU in front where there are any, by statistics already known, then the
  convolution and the statistics of its output;
- backward: the backward of the batch norm behind, the convolution's gradients of input and weight,
  and the ReLU's in front or, at the block's first convolution, the sum with the shortcut's
  gradient. The block's last convolution also has the backward of the ReLU at the block's end.

Where the two cut between links differently: our convolution leaves the sums that the next batch
norm's backward begins with, torch's batch norm makes them itself. At a block's end ours, too, makes
them itself (`bn_sums`), once for each of the two branches where the model has one pass for both.

FLOP are the convolution's alone, padding included. Bytes are the link's tensors, each once. The
share of the floor says how near a provider is to the machine's own limits (roofline.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import Comparison
from layers import Layer, conv_layers
from roofline import Roofline
from torch.nn import functional as F

from fastresnet import ops
from fastresnet.ops import Normalized, reference

EPS = 1e-5
MODES = ("forward", "backward")
# Architecture, side, batches.
NETWORKS = (
    ("resnet50", 224, (1, 16, 64)),
    ("resnet18", 224, (1, 16, 64)),
    ("resnet50", 512, (4,)),
    ("resnet18", 512, (4,)),
    ("cifar_resnet18", 32, (128,)),
)
DEFAULT = ("resnet50", 224, 16, "bfloat16")


@dataclass(frozen=True)
class Case:
    """One of the network's `layers` distinct convolutions, which it has `count` times."""

    architecture: str
    side: int
    batch: int
    dtype: str
    layer: Layer
    count: int
    layers: int
    mode: str

    @property
    def network(self) -> str:
        return f"{self.architecture}-{self.side}-b{self.batch}-{self.dtype}"

    @property
    def name(self) -> str:
        return f"{self.network}-{self.layer.name}-{self.mode}"

    @property
    def flops(self) -> int:
        layer = self.layer
        one_way = (
            2 * self.batch * layer.out_side**2 * layer.out_channels * layer.channels
        ) * layer.kernel**2
        return one_way if self.mode == "forward" else 2 * one_way

    @property
    def nbytes(self) -> int:
        """Each tensor of the link once: activations in the case's dtype, weights in float32, a bit
        for each value of a mask; the vectors of a channel's length are left out."""
        layer = self.layer
        x = self.batch * layer.side**2 * layer.channels
        y = self.batch * layer.out_side**2 * layer.out_channels
        weight = 4 * layer.out_channels * layer.channels * layer.kernel**2
        itemsize = getattr(torch, self.dtype).itemsize
        if self.mode == "forward":
            return (x + y) * itemsize + weight
        # Read: grad, y, x, the shortcut's gradient; written: that of x; the weight and its own.
        addend = x if layer.position == "first" else 0
        masks = y * (layer.position in ("last", "shortcut")) + addend * (not layer.projected)
        return (2 * y + 2 * x + addend) * itemsize + masks // 8 + 2 * weight

    def config(self) -> dict[str, Any]:
        return {
            **{"architecture": self.architecture, "side": self.side, "batch": self.batch},
            **{"dtype": self.dtype, "network": self.network, "mode": self.mode},
            **{"count": self.count, "layers": self.layers},
            **{"flops": self.flops, "bytes": self.nbytes},
            "layer": self.layer.facts() | {"name": self.layer.name},
        }


def cases() -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        for architecture, side, batches in NETWORKS:
            layers = conv_layers(architecture, side)
            for batch in batches:
                for layer, count in layers.items():
                    for mode in MODES:
                        shape = (architecture, side, batch, dtype, layer)
                        yield Case(*shape, count, len(layers), mode)


def parameter(case: Case) -> Any:
    default = (case.architecture, case.side, case.batch, case.dtype) == DEFAULT
    return pytest.param(case, id=case.name, marks=() if default else pytest.mark.all_shapes)


@pytest.mark.parametrize("case", [parameter(case) for case in cases()])
def test_conv_layer(case: Case, run: Callable[[Comparison], None], roofline: Roofline) -> None:
    run(compare(case, roofline))


def compare(case: Case, roofline: Roofline) -> Comparison:
    """The checked comparison of a case."""
    floor = roofline.floor(case.dtype, flops=case.flops, nbytes=case.nbytes)

    def figures(seconds: float) -> dict[str, float]:
        return {"ms": 1e3 * seconds, "GB/s": case.nbytes / seconds / 1e9, "floor": floor / seconds}

    comparison = Comparison(
        "conv_layers",
        case.name,
        metric="throughput",
        unit="GFLOP/s",
        work=case.flops / 1e9,
        config=case.config() | {"roofline": roofline.facts(case.dtype), "floor_seconds": floor},
        figures=figures,
    )
    link = make_link(case)
    forward = case.mode == "forward"
    for provider in (Torch(link), Fused(link), TorchConvolution(link)):
        step = provider.forward if forward else provider.backward
        results = provider.forward_results if forward else provider.backward_results
        comparison.add(provider.name, step, results, role=provider.role)
    comparison.check(truth(case, link))
    return comparison


@dataclass(frozen=True)
class Link:
    """The tensors of one link, the same for every provider.

    x: the convolution's input, or the tensor whose batch norm and ReLU are that. y: in place of
    its output, with the batch norm behind. addend: the shortcut's gradient. end: the block's
    output, where the gradient (`grad` or, in a block without projection, `addend`) has still to
    pass its ReLU; mask and addend_mask: a bit for each of its values.
    """

    layer: Layer
    x: torch.Tensor | Normalized
    weight: torch.Tensor
    y: Normalized
    grad: torch.Tensor
    end: torch.Tensor | None
    mask: torch.Tensor | None
    addend: torch.Tensor | None
    addend_mask: torch.Tensor | None


def make_link(case: Case) -> Link:
    """Random tensors of the case's shapes; activations channels_last, parameters in float32."""
    layer, dtype = case.layer, getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(3)

    def activation(channels: int, side: int) -> torch.Tensor:
        shape = (case.batch, side, side, channels)
        return torch.randn(shape, generator=generator).to(dtype).permute(0, 3, 1, 2)

    def normalized(x: torch.Tensor) -> Normalized:
        scale, shift = torch.rand(2, x.shape[1], generator=generator)
        return Normalized(x, *ops.bn_stats(x), scale + 0.5, shift - 0.5, EPS, True)

    x = activation(layer.channels, layer.side)
    # A block's input is the one before's output, behind its ReLU.
    source = normalized(x) if layer.prologue else x.relu_()
    fan_in = layer.channels * layer.kernel**2
    weight = torch.randn(
        layer.out_channels, layer.channels, layer.kernel, layer.kernel, generator=generator
    )
    weight = (weight * fan_in**-0.5).contiguous(memory_format=torch.channels_last)
    y = normalized(activation(layer.out_channels, layer.out_side))
    grad = activation(layer.out_channels, layer.out_side)
    end = mask = addend = addend_mask = None
    if layer.position in ("last", "shortcut"):
        end = activation(layer.out_channels, layer.out_side).relu_()
        mask = pack(end > 0)
    if layer.position == "first":
        addend = activation(layer.channels, layer.side)
        if not layer.projected:
            end = activation(layer.channels, layer.side).relu_()
            addend_mask = pack(end > 0)
    return Link(layer, source, weight, y, grad, end, mask, addend, addend_mask)


def pack(values: torch.Tensor) -> torch.Tensor:
    """Bool [N, C, H, W] as a bit each: uint8 [N, H, W, C / 8]."""
    bits = values.permute(0, 2, 3, 1)
    bits = F.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def truth(case: Case, link: Link) -> Mapping[str, torch.Tensor]:
    """What a link computes, in float64 from the same stored values."""

    def double(value: Any) -> Any:
        if isinstance(value, Normalized):
            return Normalized(*(tensor.double() for tensor in value[:5]), *value[5:])
        return value.double()

    x, y, grad, weight = double(link.x), double(link.y), link.grad.double(), link.weight.double()
    if case.mode == "forward":
        out, mean, var = reference.conv_stats(x, weight, **link.layer.geometry)
        return {"y": out, "mean": mean, "var": var}
    sums, _ = reference.bn_sums(grad, link.mask, y.x, y.mean)
    gradients = reference.conv_bn_backward(
        *(grad, link.mask, sums, y, x, weight),
        **link.layer.geometry,
        addend=None if link.addend is None else link.addend.double(),
        addend_mask=link.addend_mask,
    )
    return without_none(gradients._asdict())


def without_none(results: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in results.items() if tensor is not None}


class Fused:
    """Ours: an operator a link, and the sums at a block's end."""

    name, role = "fastresnet", "ours"

    def __init__(self, link: Link) -> None:
        self.link = link
        # What the link behind hands over; at a block's end the link makes them itself.
        self.sums = self._sums() if link.mask is None else None

    def _sums(self) -> torch.Tensor:
        link = self.link
        return ops.bn_sums(link.grad, link.mask, link.y.x, link.y.mean)[0]

    def forward(self) -> tuple[torch.Tensor, ...]:
        return ops.conv_stats(self.link.x, self.link.weight, **self.link.layer.geometry)

    def backward(self) -> ops.ConvGradients:
        link = self.link
        return ops.conv_bn_backward(
            *(link.grad, link.mask, self._sums() if self.sums is None else self.sums),
            *(link.y, link.x, link.weight),
            **link.layer.geometry,
            addend=link.addend,
            addend_mask=link.addend_mask,
        )

    def forward_results(self) -> dict[str, torch.Tensor]:
        return dict(zip(("y", "mean", "var"), self.forward(), strict=True))

    def backward_results(self) -> dict[str, torch.Tensor]:
        return without_none(self.backward()._asdict())


class Torch:
    """The same by ATen's operators, as autograd and autocast call them."""

    name, role = "torch", "baseline"

    def __init__(self, link: Link) -> None:
        self.link = link
        channels = link.layer.out_channels
        self.running_mean, self.running_var = torch.zeros(channels), torch.ones(channels)
        # Saved by the forward, for the backward.
        self.value = self._value()
        self.kernel = self._kernel()
        self.inverse_std = (link.y.var + EPS).rsqrt()
        # What the block's end hands to both of its branches.
        self.addend, self.grad = link.addend, link.grad
        if link.addend_mask is not None:
            self.addend = torch.ops.aten.threshold_backward(link.addend, link.end, 0)
        if link.layer.position == "shortcut":
            self.grad = torch.ops.aten.threshold_backward(link.grad, link.end, 0)

    def _value(self) -> torch.Tensor:
        x = self.link.x
        if not isinstance(x, Normalized):
            return x
        z = F.batch_norm(x.x, x.mean, x.var, x.weight, x.bias, training=False, eps=x.eps)
        return z.relu_()

    def _kernel(self) -> torch.Tensor:
        return self.link.weight.to(self.link.y.x.dtype)

    def _convolve(self, value: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return F.conv2d(value, kernel, None, **self.link.layer.geometry)

    def _convolve_backward(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.link.layer
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            *(grad, self.value, self.kernel, None),
            *([layer.stride] * 2, [layer.padding] * 2, [layer.dilation] * 2),
            *(False, [0, 0], 1, [True, True, False]),
        )
        return dx, dweight

    def forward(self) -> tuple[torch.Tensor, ...]:
        y = self._convolve(self._value(), self._kernel())
        # The half of ATen's batch norm that collects the statistics; with running ones, as in
        # training, because it returns float32 only then.
        return y, *torch.batch_norm_update_stats(y, self.running_mean, self.running_var, 0.1)

    def backward(self) -> ops.ConvGradients:
        link, y, grad = self.link, self.link.y, self.grad
        if link.layer.position == "last":
            grad = torch.ops.aten.threshold_backward(grad, link.end, 0)
        dy, dbn_weight, dbn_bias = torch.ops.aten.native_batch_norm_backward(
            grad, y.x, y.weight, None, None, y.mean, self.inverse_std, True, EPS, [True] * 3
        )
        dx, dweight = self._convolve_backward(dy)
        if link.layer.prologue:
            dx = torch.ops.aten.threshold_backward(dx, self.value, 0)
        elif self.addend is not None:
            dx.add_(self.addend)
        return ops.ConvGradients(dx, dweight.float(), dbn_weight, dbn_bias, None)

    def forward_results(self) -> dict[str, torch.Tensor]:
        return dict(zip(("y", "mean", "var"), self.forward(), strict=True))

    def backward_results(self) -> dict[str, torch.Tensor]:
        """With the sums that the next batch norm's backward would find in the gradient."""
        gradients, x = self.backward(), self.link.x
        if isinstance(x, Normalized):
            sums, _ = reference.bn_sums(gradients.x, None, x.x, x.mean)
            gradients = gradients._replace(sums=sums)
        return without_none(gradients._asdict())


class TorchConvolution(Torch):
    """Torch's convolution alone, with nothing around it."""

    name, role = "torch, convolution alone", "context"

    def forward(self) -> torch.Tensor:
        return self._convolve(self.value, self.kernel)

    def backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._convolve_backward(self.grad)

    def forward_results(self) -> dict[str, torch.Tensor]:
        return {"y": self.forward()}

    def backward_results(self) -> dict[str, torch.Tensor]:
        """None: what it is given is not the gradient of the convolution's output."""
        self.backward()
        return {}
