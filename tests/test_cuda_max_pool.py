# SPDX-License-Identifier: Apache-2.0
"""Batch norm, ReLU and max-pool in one on CUDA, run on the host by tests/emulator, against float64
autograd."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator import EmulatorError, MaxPoolKernels, Norm, Schedule
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place of the storage type, doubled for the float32 arithmetic before it.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SHAPES = {  # batch, height, width, channels
    "resnet50_stem": (2, 16, 16, 64),
    "odd_sides": (2, 13, 9, 24),
    "no_whole_octet": (3, 7, 8, 13),
    "half_an_octet_of_float32": (2, 8, 8, 12),
    "one_channel": (2, 9, 6, 1),
    "one_row_of_pixels": (2, 1, 23, 16),
    "two_columns_of_blocks": (1, 6, 6, 72),
}
WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2), (2, 3, 0), (1, 1, 0)]
SCHEDULES = [Schedule.drawn(seed) for seed in range(48)]


@pytest.fixture
def kernels(emulated: Callable[[str], ctypes.CDLL]) -> MaxPoolKernels:
    return MaxPoolKernels(emulated("max_pool"))


def fits(shape: tuple[int, ...], windows: tuple[int, int, int]) -> bool:
    return min(shape[1:3]) + 2 * windows[2] >= windows[0]


def check(
    kernels: MaxPoolKernels,
    shape: tuple[int, ...],
    windows: tuple[int, int, int],
    dtype: torch.dtype,
    training: bool,
    seed: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Distinct values a channel, so that rounding does not decide which of a window is the largest.
    count, channels = shape[0] * shape[1] * shape[2], shape[3]
    order = torch.rand(count, channels, generator=generator).argsort(0)
    steps = 256 if dtype == torch.bfloat16 else count
    x = ((order % steps).float() / min(steps, 64) - 1).view(shape).to(dtype)
    weight = torch.rand(channels, generator=generator) + 0.5
    weight[::3] *= -1
    bias = torch.randn(channels, generator=generator)
    flat = x.double().flatten(0, 2)
    var, mean = torch.var_mean(flat, 0, correction=0)
    if not training:
        mean, var = mean + 0.25, var + 0.5
    norm = Norm(mean.float(), var.float(), weight, bias, eps=1e-3)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    statistics = (None, None) if training else (norm.mean.double(), norm.var.double())
    z = F.batch_norm(
        leaves[0].permute(0, 3, 1, 2), *statistics, *leaves[1:], training, 0.0, norm.eps
    )
    expected = F.max_pool2d(z.relu(), *windows)
    grad = torch.randn(expected.shape, generator=generator).to(dtype)
    # Next to zero, rounding decides which way ReLU goes: no gradient arrives there.
    grad = torch.where(F.max_pool2d(z.detach(), *windows).abs() < 1e-3, 0, grad)
    wanted = torch.autograd.grad(expected, leaves, grad.double())

    out, index = kernels.forward(x, norm, windows)
    rows = grad.permute(0, 2, 3, 1).contiguous()
    found = kernels.backward(rows, index, x, norm, windows, training)
    relative = RELATIVE[dtype]
    torch.testing.assert_close(
        out.double(), expected.detach().permute(0, 2, 3, 1), rtol=relative, atol=1e-5
    )
    terms = (-(-windows[0] // windows[1])) ** 2  # gradients that meet in a pixel
    scale = wanted[0].abs().max().item()
    torch.testing.assert_close(
        found["dx"].double(), wanted[0], rtol=relative, atol=1e-5 * terms * max(1, scale)
    )
    for name, exact in zip(("dweight", "dbias"), wanted[1:], strict=True):
        torch.testing.assert_close(
            found[name].double(),
            exact,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda text, n=name: f"{n} {text}",
        )


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64_autograd(
    kernels: MaxPoolKernels, shape: str, windows: tuple[int, int, int]
) -> None:
    if not fits(SHAPES[shape], windows):
        pytest.skip("no window fits")
    for index, (dtype, training) in enumerate((d, t) for d in DTYPES for t in (True, False)):
        kernels.schedule = SCHEDULES[index]
        check(kernels, SHAPES[shape], windows, dtype, training)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(1, 40)
    ).filter(lambda s: s[0] * s[1] * s[2] >= 2),
    kernel=st.integers(1, 15),
    stride=st.integers(1, 6),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
    multiprocessors=st.integers(1, 8),
    schedule=st.sampled_from(SCHEDULES),
)
def test_random_shapes_and_schedules(
    kernels, shape, kernel, stride, data, dtype, training, multiprocessors, schedule
) -> None:
    windows = (kernel, stride, data.draw(st.integers(0, kernel // 2)))
    if fits(shape, windows):
        kernels.schedule, kernels.multiprocessors = schedule, multiprocessors
        check(kernels, shape, windows, dtype, training, schedule.seed)


def tied(kernels: MaxPoolKernels, x: Tensor, windows: tuple[int, int, int]) -> list[Tensor]:
    """Output and gradient of ``x`` of ours and of torch, batch norm being the identity."""
    channels = x.shape[3]
    zero, one = torch.zeros(channels), torch.ones(channels)
    norm = Norm(zero, one, one, zero, eps=0.0)
    out, index = kernels.forward(x, norm, windows)
    grad = torch.arange(1.0, out.numel() + 1).view(out.shape)
    dx = kernels.backward(grad, index, x, norm, windows, False)["dx"]
    leaf = x.permute(0, 3, 1, 2).clone().requires_grad_()
    torchs = F.max_pool2d(leaf.relu(), *windows)
    (torchs_dx,) = torch.autograd.grad(torchs, leaf, grad.permute(0, 3, 1, 2))
    return [out, torchs.detach().permute(0, 2, 3, 1), dx, torchs_dx.permute(0, 2, 3, 1)]


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_of_equal_values_the_first_gets_the_gradient(kernels: MaxPoolKernels, windows) -> None:
    out, torchs, dx, torchs_dx = tied(
        kernels, torch.randint(-1, 3, (2, 11, 9, 19)).float(), windows
    )
    assert torch.equal(out, torchs)
    assert torch.equal(dx, torchs_dx)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_as_in_torch(kernels: MaxPoolKernels, value: float) -> None:
    x = torch.randint(-3, 4, (2, 9, 9, 16)).float()
    x[torch.rand(x.shape) < 0.2] = value
    out, torchs, dx, torchs_dx = tied(kernels, x, (3, 2, 1))
    torch.testing.assert_close(out, torchs, rtol=0, atol=0, equal_nan=True)
    finite = x.isfinite()  # times zero, an infinite x leaves NaN where torch never multiplies
    torch.testing.assert_close(dx[finite], torchs_dx[finite], rtol=0, atol=0, equal_nan=True)


def test_results_do_not_depend_on_the_schedule(kernels: MaxPoolKernels) -> None:
    kernels.multiprocessors = 4
    x = torch.randn(2, 30, 30, 16).to(torch.float16)
    norm = Norm(torch.zeros(16), torch.ones(16), torch.ones(16), torch.zeros(16))
    results = []
    for schedule in SCHEDULES[:6]:
        kernels.schedule = schedule
        out, index = kernels.forward(x, norm, (3, 2, 1))
        gradients = kernels.backward(out, index, x, norm, (3, 2, 1), True)
        results.append([out, index, *gradients.values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_every_pass_reads_and_writes_its_tensors_once(kernels: MaxPoolKernels) -> None:
    """Behind a cache: the windows overlap, so threads ask for most of it more than once."""
    x = torch.randn(2, 32, 32, 64).to(torch.bfloat16)
    norm = Norm(torch.zeros(64), torch.ones(64), torch.ones(64), torch.zeros(64))
    whole, pooled, vectors = 2 * x.numel(), x.numel() // 4, 64 * 1024
    out, index = kernels.forward(x, norm, (3, 2, 1))
    loaded, stored = (32 * count.sectors for count in kernels.traffic)
    assert 0 <= loaded - whole < vectors
    assert stored == 3 * pooled
    kernels.backward(out, index, x, norm, (3, 2, 1), True)
    loaded, stored = (32 * count.sectors for count in kernels.traffic)
    assert 0 <= loaded - 2 * (whole + 3 * pooled) < vectors
    assert 0 <= stored - whole < vectors


def test_each_barrier_is_needed(kernels: MaxPoolKernels) -> None:
    def is_noticed(schedules: list[Schedule]) -> bool:
        for schedule in schedules:
            kernels.schedule = schedule
            try:
                check(kernels, (1, 40, 40, 64), (3, 2, 1), torch.float16, True)
            except (AssertionError, EmulatorError):
                return True
        return False

    kernels.multiprocessors = 2
    assert not is_noticed(SCHEDULES[:2])
    barriers = kernels.barriers()
    assert len(barriers) >= 4
    unnoticed = []
    for line in barriers:
        kernels.skipped_line = line
        if not is_noticed(SCHEDULES[1:]):
            unnoticed.append(line)
    assert not unnoticed, f"no schedule misses the barriers of lines {unnoticed}"
