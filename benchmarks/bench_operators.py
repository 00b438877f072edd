# SPDX-License-Identifier: Apache-2.0
"""Each fused operator, statistics, forward and backward, at ResNet-50's layer shapes, beside the
separate ATen calls that it replaces.

GB/s counts, for every provider, the bytes that the fused operator has to move: it compares times
and, for ours, says how far the memory's own speed is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest
import torch
from harness import Comparison
from torch.nn import functional as F

from fastresnet import ops

EPS = 1e-5
BATCH = 16


@dataclass(frozen=True)
class Operator:
    """passes: how often a tensor of x's size is read or written, with the statistics taken in one
    pass and the backward sums in another; the masks and positions, an eighth of x or less, are
    left out."""

    name: str
    residual: bool
    dual: bool
    passes: float
    pooled: bool = False


OPERATORS = {
    operator.name: operator
    for operator in (
        # forward: x for the statistics, x, out; backward: grad, x for the sums, grad, x, dx
        Operator("bn", residual=False, dual=False, passes=8),
        Operator("bn_relu", residual=False, dual=False, passes=8),
        # and forward the residual, backward its gradient
        Operator("bn_add_relu", residual=True, dual=False, passes=10),
        # and the residual for its statistics and twice in backward
        Operator("bn_add_bn_relu", residual=True, dual=True, passes=13),
        # x for the statistics, x; backward: x for the sums, x, dx; three times a quarter
        Operator("bn_relu_max_pool", residual=False, dual=False, passes=5.75, pooled=True),
    )
}


@dataclass(frozen=True)
class Case:
    operator: str
    channels: int
    side: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.operator}-{self.channels}x{self.side}x{self.side}-b{BATCH}-{self.dtype}"


# Where ResNet-50 has them: the stem and the blocks' inner links; the joins, plain and with a
# projection; `bn` alone is the projection's where the join is not fused.
INNER = ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7))
JOIN = ((256, 56), (512, 28), (1024, 14), (2048, 7))
SHAPES = {"bn_relu": INNER, "bn_relu_max_pool": INNER[:1]}
WINDOWS = {"kernel_size": 3, "stride": 2, "padding": 1}
CASES = tuple(
    Case(operator, channels, side, dtype)
    for dtype in ("bfloat16", "float32")
    for operator in OPERATORS
    for channels, side in SHAPES.get(operator, JOIN)
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator(case: Case, run: Callable[[Comparison], None]) -> None:
    operator, dtype = OPERATORS[case.operator], getattr(torch, case.dtype)
    tensors = inputs(operator, case, dtype)
    comparison = Comparison(
        "operators",
        case.name,
        metric="bandwidth",
        unit="GB/s",
        work=operator.passes * tensors["x"].numel() * dtype.itemsize / 1e9,
        config=asdict(case) | {"batch": BATCH, "passes": operator.passes},
    )
    for name, role, function in (("ATen", "baseline", aten), ("fastresnet", "ours", fused)):
        work = Work(operator, function, tensors)
        comparison.add(name, work.step, work.results, role=role)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    comparison.check(Work(operator, aten, exact).results())
    run(comparison)


class Work:
    """Forward and backward of one function on its own leaves."""

    def __init__(
        self, operator: Operator, function: Callable, tensors: dict[str, torch.Tensor]
    ) -> None:
        self.grad = tensors["grad"]
        self.leaves = {
            name: tensor.detach().clone().requires_grad_()
            for name, tensor in tensors.items()
            if name != "grad"
        }
        self.forward = lambda: function(operator, **self.leaves)

    def step(self) -> tuple[torch.Tensor, ...]:
        out = self.forward()
        return (out, *torch.autograd.grad(out, list(self.leaves.values()), self.grad))

    def results(self) -> dict[str, torch.Tensor]:
        names = ["out", *(f"d{name}" for name in self.leaves)]
        return {name: tensor.detach() for name, tensor in zip(names, self.step(), strict=True)}


def fused(
    operator: Operator,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    residual_weight: torch.Tensor | None = None,
    residual_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    function = getattr(ops, operator.name)
    link = (x, *ops.bn_stats(x), weight, bias)
    if operator.dual:
        branch = (residual, *ops.bn_stats(residual), residual_weight, residual_bias)
        return function(*link, *branch, eps=EPS, residual_eps=EPS, training=True)
    if operator.residual:
        return function(*link, residual, eps=EPS, training=True)
    if operator.pooled:
        return function(*link, **WINDOWS, eps=EPS, training=True)
    return function(*link, eps=EPS, training=True)


def aten(
    operator: Operator,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    residual_weight: torch.Tensor | None = None,
    residual_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    out = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    if operator.dual:
        residual = F.batch_norm(
            residual, None, None, residual_weight, residual_bias, training=True, eps=EPS
        )
    if operator.residual:
        out += residual
    if operator.name != "bn":
        out = F.relu(out, inplace=True)
    return F.max_pool2d(out, **WINDOWS) if operator.pooled else out


def inputs(operator: Operator, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Activations in `dtype`, channels_last, and the parameters in float32."""
    generator = torch.Generator().manual_seed(2)

    def activation(side: int = case.side) -> torch.Tensor:
        shape = (BATCH, case.channels, side, side)
        values = torch.randn(shape, generator=generator) * 2 + 0.5
        return values.to(dtype, memory_format=torch.channels_last)

    def parameter() -> torch.Tensor:
        return torch.rand(case.channels, generator=generator) + 0.5

    grad = activation(case.side // 2 if operator.pooled else case.side)
    tensors = {"grad": grad, "x": activation(), "weight": parameter(), "bias": parameter()}
    if operator.residual:
        tensors["residual"] = activation()
    if operator.dual:
        tensors |= {"residual_weight": parameter(), "residual_bias": parameter()}
    return tensors
