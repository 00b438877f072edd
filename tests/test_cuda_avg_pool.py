# SPDX-License-Identifier: Apache-2.0
"""The average over a map on CUDA, run on the host by tests/emulator, against float64 autograd."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from emulator import AvgPoolKernels, Schedule
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place of the storage type, and float32's arithmetic before it.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SHAPES = {  # batch, height, width, channels
    "resnet50": (2, 7, 7, 256),
    "no_whole_octet": (3, 7, 8, 13),
    "half_an_octet_of_float32": (2, 8, 8, 12),
    "one_channel": (2, 9, 6, 1),
    "one_pixel": (5, 1, 1, 16),
    "one_row_of_pixels": (2, 1, 23, 16),
    "more_images_than_rows_of_threads": (40, 2, 3, 72),
}
SCHEDULES = [Schedule.drawn(seed) for seed in range(48)]


@pytest.fixture
def kernels(emulated: Callable[[str], ctypes.CDLL]) -> AvgPoolKernels:
    return AvgPoolKernels(emulated("avg_pool"))


def check(
    kernels: AvgPoolKernels, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) + 0.5).to(dtype)
    grad = torch.randn(shape[0], shape[3], generator=generator).to(dtype)
    leaf = x.double().requires_grad_()
    exact = leaf.mean((1, 2))
    (exact_dx,) = torch.autograd.grad(exact, leaf, grad.double())
    out, dx = kernels.forward(x), kernels.backward(grad, *shape[1:3])
    # A sum's rounding is relative to its terms.
    terms = x.double().abs().mean((1, 2))
    assert ((out.double() - exact).abs() <= RELATIVE[dtype] * terms).all()
    torch.testing.assert_close(dx.double(), exact_dx, rtol=RELATIVE[dtype], atol=2.0**-24)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64_autograd(kernels: AvgPoolKernels, shape: str) -> None:
    for index, dtype in enumerate(DTYPES):
        kernels.schedule = SCHEDULES[index]
        check(kernels, SHAPES[shape], dtype)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers(1, 80)),
    dtype=st.sampled_from(DTYPES),
    multiprocessors=st.integers(1, 8),
    schedule=st.sampled_from(SCHEDULES),
)
def test_random_shapes_and_schedules(kernels, shape, dtype, multiprocessors, schedule) -> None:
    kernels.schedule, kernels.multiprocessors = schedule, multiprocessors
    check(kernels, shape, dtype, schedule.seed)


def test_results_depend_on_neither_schedule_nor_device(kernels: AvgPoolKernels) -> None:
    x = torch.randn(9, 5, 6, 40).to(torch.float16)
    results = []
    for index, schedule in enumerate(SCHEDULES[:6]):
        kernels.schedule, kernels.multiprocessors = schedule, 1 + index
        out = kernels.forward(x)
        results.append([out, kernels.backward(out, 5, 6)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_stay_in_their_channel(kernels: AvgPoolKernels, value: float) -> None:
    x = torch.randn(2, 5, 5, 24)
    x[1, 2, 3, 7] = value
    out = kernels.forward(x)
    torch.testing.assert_close(out, x.mean((1, 2)), equal_nan=True)
    assert out.isfinite().sum() == out.numel() - 1


def test_each_pass_moves_its_tensors_once(kernels: AvgPoolKernels) -> None:
    """In whole transactions, 32 bytes by neighbouring threads."""
    x = torch.randn(4, 7, 7, 128).to(torch.bfloat16)
    whole, averages = 2 * x.numel(), 2 * 4 * 128
    out = kernels.forward(x)
    loaded, stored = kernels.traffic
    assert 32 * loaded.sectors == 32 * loaded.transactions == whole
    assert 32 * stored.sectors == 32 * stored.transactions == averages
    kernels.backward(out, 7, 7)
    loaded, stored = kernels.traffic
    assert 32 * loaded.sectors == averages
    assert 32 * stored.sectors == 32 * stored.transactions == whole
