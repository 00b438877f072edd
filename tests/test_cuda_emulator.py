# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the host by tests/emulator, against float64 autograd."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from emulator import (
    BatchNormKernels,
    EmulatorError,
    Norm,
    Schedule,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

FORMS = ["bn", "bn_relu", "bn_add_relu", "bn_add_bn_relu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # rows, channels
    "one_row": (1, 8),
    "one_channel": (70, 1),
    "fewer_channels_than_an_octet": (37, 5),
    "prime": (131, 13),
    "whole_words_of_float32_only": (97, 12),
    "three_octets": (130, 24),
    "resnet50_layer1": (257, 64),
    "two_columns_of_blocks": (75, 72),
    "resnet50_layer4": (49, 512),
}
SCHEDULES = [
    Schedule(),
    Schedule(seed=1),
    Schedule(seed=2, resident_blocks=3),
    Schedule(seed=3, resident_blocks=4, hold_permille=20),
]
SEARCHING = [Schedule.drawn(seed) for seed in range(1, 41)]

# Half a unit in the last place of the storage type, doubled for the float32 arithmetic before it.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# Where terms of size 10 cancel, float32 leaves a few units of 10 * 2**-24; float16 is subnormal
# below 6e-5 and steps by 6e-8 there.
ABSOLUTE = 1e-5
# Sums over at most some thousand values of size 10.
SUM_RELATIVE, SUM_ABSOLUTE = 1e-5, 2e-4


@pytest.fixture
def kernels(emulated: Callable[[str], ctypes.CDLL]) -> BatchNormKernels:
    return BatchNormKernels(emulated("bn_act"))


@dataclass(frozen=True)
class Sample:
    x: Tensor
    norm: Norm
    residual: Tensor | None
    residual_norm: Norm | None
    grad: Tensor
    shortcut_grad: Tensor | None
    expected: dict[str, Tensor]


def make_norm(x: Tensor, generator: torch.Generator, training: bool) -> Norm:
    channels = x.shape[1]
    weight = torch.rand(channels, generator=generator) + 0.5
    weight[::3] *= -1
    bias = torch.randn(channels, generator=generator)
    if training:
        var, mean = torch.var_mean(x.double(), 0, correction=0)
    else:
        mean = torch.randn(channels, generator=generator)
        var = torch.rand(channels, generator=generator) + 0.5
    return Norm(mean.float(), var.float(), weight, bias, eps=1e-3)


def make_sample(
    form: str,
    rows: int,
    channels: int,
    dtype: torch.dtype,
    training: bool,
    seed: int = 0,
    two_gradients: bool = False,
) -> Sample:
    """Random inputs, and every result of forward and backward by float64 autograd."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, channels, generator=generator) * 2 + 3).to(dtype)
    grad = torch.randn(rows, channels, generator=generator).to(dtype)
    residual, residual_norm = None, None
    if "add" in form:
        residual = (torch.randn(rows, channels, generator=generator) * 2 - 1).to(dtype)
    norm = make_norm(x, generator, training)
    if form == "bn_add_bn_relu":
        residual_norm = make_norm(residual, generator, training)

    def leaf(t: Tensor) -> Tensor:
        return t.double().requires_grad_()

    def batch_norm(values: Tensor, n: Norm, weight: Tensor, bias: Tensor) -> Tensor:
        if training:
            return F.batch_norm(values, None, None, weight, bias, True, 0.0, n.eps)
        return F.batch_norm(
            values, n.mean.double(), n.var.double(), weight, bias, False, 0.0, n.eps
        )

    leaves = {"dx": leaf(x), "dweight": leaf(norm.weight), "dbias": leaf(norm.bias)}
    # F.batch_norm refuses training on one value a channel; there every z is the bias.
    if training and rows == 1:
        z = leaves["dbias"] + 0 * leaves["dx"] + 0 * leaves["dweight"]
    else:
        z = batch_norm(leaves["dx"], norm, leaves["dweight"], leaves["dbias"])
    if residual is not None:
        leaves["dresidual"] = leaf(residual)
        branch = leaves["dresidual"]
        if residual_norm is not None:
            leaves["dresidual_weight"] = leaf(residual_norm.weight)
            bias = residual_norm.bias.double()
            if training and rows == 1:
                branch = bias + 0 * branch + 0 * leaves["dresidual_weight"]
            else:
                branch = batch_norm(branch, residual_norm, leaves["dresidual_weight"], bias)
        z = z + branch
    # Next to zero, rounding decides which way ReLU goes: no gradient arrives there.
    if form != "bn":
        grad = torch.where(z.detach().abs() < 1e-4, 0, grad)
    shortcut_grad, whole = None, grad
    if two_gradients:
        shortcut_grad = torch.randn(rows, channels, generator=generator).to(dtype)
        shortcut_grad = torch.where(z.detach().abs() < 1e-4, 0, shortcut_grad)
        whole = grad + shortcut_grad  # rounded, as autograd's accumulation is
    out = z if form == "bn" else z.relu()
    gradients = torch.autograd.grad(out, list(leaves.values()), whole.double())
    expected = dict(zip(leaves, gradients, strict=True)) | {"out": out.detach(), "z": z.detach()}
    return Sample(x, norm, residual, residual_norm, grad, shortcut_grad, expected)


def run_sample(
    kernels: BatchNormKernels, form: str, sample: Sample, training: bool
) -> dict[str, Tensor]:
    """Statistics, forward and backward of one sample; what a form does not have is left out."""
    mean, var = kernels.stats(sample.x)
    out, mask = kernels.forward(form, sample.x, sample.norm, sample.residual, sample.residual_norm)
    gradients = kernels.backward(
        form,
        sample.grad,
        mask,
        sample.x,
        sample.norm,
        sample.residual,
        sample.residual_norm,
        training,
        sample.shortcut_grad,
    )
    results = {"mean": mean, "var": var, "out": out, "mask": mask, **gradients}
    return {name: value for name, value in results.items() if value is not None}


def unpack_mask(mask: Tensor) -> Tensor:
    return (mask.unsqueeze(2) >> torch.arange(8) & 1).flatten(1).bool()


def check_sample(results: dict[str, Tensor], sample: Sample) -> None:
    dtype, expected = sample.x.dtype, dict(sample.expected)
    z = expected.pop("z")
    var, mean = torch.var_mean(sample.x.double(), 0, correction=0)
    torch.testing.assert_close(results["mean"].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results["var"].double(), var, rtol=1e-5, atol=1e-6)
    for name, value in expected.items():
        whole = name in ("out", "dx", "dresidual")
        torch.testing.assert_close(
            results[name].double(),
            value,
            rtol=RELATIVE[dtype] if whole else SUM_RELATIVE,
            atol=ABSOLUTE if whole else SUM_ABSOLUTE,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    if "mask" in results:
        bits = unpack_mask(results["mask"])
        channels = z.shape[1]
        certain = z.abs() >= 1e-4
        assert torch.equal(bits[:, :channels][certain], (z > 0)[certain])
        assert not bits[:, channels:].any(), "padding bits of the mask are set"


CASES = list(itertools.product(FORMS, DTYPES, [True, False]))


@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64_autograd(kernels: BatchNormKernels, shape: str) -> None:
    for index, (form, dtype, training) in enumerate(CASES):
        kernels.schedule = SCHEDULES[index % len(SCHEDULES)]
        two_gradients = "add" in form and index % 2 == 0
        sample = make_sample(form, *SHAPES[shape], dtype, training, two_gradients=two_gradients)
        check_sample(run_sample(kernels, form, sample, training), sample)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(FORMS),
    rows=st.integers(1, 200),
    channels=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
    two_gradients=st.booleans(),
    multiprocessors=st.integers(1, 8),
    schedule=st.builds(
        Schedule, st.integers(1, 2**32), st.integers(1, 4), st.sampled_from([0, 20, 80])
    ),
)
def test_random_shapes_and_schedules(
    kernels: BatchNormKernels,
    form: str,
    rows: int,
    channels: int,
    dtype: torch.dtype,
    training: bool,
    two_gradients: bool,
    multiprocessors: int,
    schedule: Schedule,
) -> None:
    kernels.schedule, kernels.multiprocessors = schedule, multiprocessors
    two_gradients &= "add" in form
    sample = make_sample(form, rows, channels, dtype, training, schedule.seed, two_gradients)
    check_sample(run_sample(kernels, form, sample, training), sample)


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
def test_any_number_of_multiprocessors(kernels: BatchNormKernels, multiprocessors: int) -> None:
    kernels.multiprocessors = multiprocessors
    kernels.schedule = Schedule(seed=4, resident_blocks=2)
    sample = make_sample("bn_add_bn_relu", 2500, 8, torch.bfloat16, training=True)
    check_sample(run_sample(kernels, "bn_add_bn_relu", sample, True), sample)


@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_the_schedule(kernels: BatchNormKernels, form: str) -> None:
    kernels.multiprocessors = 4
    sample = make_sample(form, 1100, 16, torch.float16, training=True)
    first = run_sample(kernels, form, sample, True)
    for schedule in SCHEDULES[1:]:
        kernels.schedule = schedule
        for name, value in run_sample(kernels, form, sample, True).items():
            assert torch.equal(value, first[name]), f"{name} under {schedule}"


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (-3e4, 1.0), (1e-6, 1e-9), (0.0, 1e12)])
def test_statistics_of_extreme_values(kernels: BatchNormKernels, mean: float, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 8, generator=generator) * std + mean
    found_mean, found_var = kernels.stats(x)
    var, exact_mean = torch.var_mean(x.double(), 0, correction=0)
    torch.testing.assert_close(found_mean.double(), exact_mean, rtol=1e-6, atol=1e-6 * std)
    # float32 itself keeps a value near 3e4 to 2e-3; the sum of squares is exact to that.
    torch.testing.assert_close(found_var.double(), var, rtol=1e-4, atol=0)


def test_constant_channel_has_no_variance(kernels: BatchNormKernels) -> None:
    mean, var = kernels.stats(torch.full((3000, 8), 1234.5))
    assert torch.equal(mean, torch.full((8,), 1234.5))
    assert torch.equal(var, torch.zeros(8))


# ---- What follows sums that a convolution's kernel has made.


def sums_of(x: Tensor) -> Tensor:
    """As such a kernel makes them: plain sums in float32."""
    values = x.float()
    return torch.stack([values.sum(0), values.square().sum(0)])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 300),
    channels=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    multiprocessors=st.integers(1, 8),
    schedule=st.builds(
        Schedule, st.integers(1, 2**32), st.integers(1, 4), st.sampled_from([0, 20, 80])
    ),
)
def test_statistics_of_sums(
    kernels: BatchNormKernels,
    rows: int,
    channels: int,
    dtype: torch.dtype,
    multiprocessors: int,
    schedule: Schedule,
) -> None:
    kernels.schedule, kernels.multiprocessors = schedule, multiprocessors
    generator = torch.Generator().manual_seed(schedule.seed)
    spread = 10 ** torch.randn(channels, generator=generator)
    x = (torch.randn(rows, channels, generator=generator) * spread + 2 * spread).to(dtype)
    mean, var = kernels.stats(x, sums_of(x))
    exact_var, exact_mean = torch.var_mean(x.double(), 0, correction=0)
    size = x.double().square().mean(0).sqrt()
    torch.testing.assert_close(
        mean / size, exact_mean / size, rtol=1e-5, atol=1e-6, check_dtype=False
    )
    # 1e-7 of the mean square, which is at most a hundred times the variance.
    torch.testing.assert_close(
        var / size**2, exact_var / size**2, rtol=1e-4, atol=1e-6, check_dtype=False
    )


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (-1e4, 1.0), (1e-6, 1e-9), (30.0, 1.0)])
def test_statistics_whose_sums_say_too_little(
    kernels: BatchNormKernels, mean: float, std: float
) -> None:
    """One channel of 130 has a mean so large that its squares swallow its variance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 130, generator=generator)
    x[:, 70] = x[:, 70] * std + mean
    sums = sums_of(x)
    naive = sums[1, 70] / 3000 - (sums[0, 70] / 3000) ** 2
    found_mean, found_var = kernels.stats(x, sums)
    loaded = kernels.traffic.loaded.bytes
    # The 64 channels around it come as if there were no sums, bit for bit
    # (test_statistics_of_extreme_values says how near that is); the others from theirs.
    for found, whole in zip((found_mean, found_var), kernels.stats(x), strict=True):
        assert torch.equal(found[64:128], whole[64:128])
    var, exact_mean = torch.var_mean(x.double(), 0, correction=0)
    others = torch.arange(130) != 70
    torch.testing.assert_close(found_mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_var[others].double(), var[others], rtol=1e-5, atol=0)
    if mean > 100:  # there the formula is far off
        assert abs(naive - var[70]) > 0.01 * var[70]
    # Only the 64 channels around it were read again.
    assert 3000 * 64 * 4 <= loaded < 3000 * 64 * 4 * 1.3


def test_sums_that_say_enough_are_all_that_is_read(kernels: BatchNormKernels) -> None:
    x = torch.randn(4000, 128).bfloat16()
    kernels.stats(x, sums_of(x))
    loaded, stored = kernels.traffic
    assert loaded.bytes <= 2 * 128 * 4 * 8
    assert stored.bytes == 2 * 128 * 4


def test_sums_that_are_not_numbers(kernels: BatchNormKernels) -> None:
    x = torch.randn(100, 16)
    x[3, 5] = float("nan")
    mean, var = kernels.stats(x, sums_of(x))
    assert mean.isnan().nonzero().tolist() == var.isnan().nonzero().tolist() == [[5]]
    assert torch.equal(*(kernels.stats(x[:, 8:].contiguous(), s)[0] for s in (None, None)))
    zeros = torch.zeros(50, 8)
    assert not any(vector.any() for vector in kernels.stats(zeros, sums_of(zeros)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
def test_backward_of_sums(kernels: BatchNormKernels, dual: bool, dtype: torch.dtype) -> None:
    form = "bn_add_bn_relu" if dual else "bn_relu"
    shapes = itertools.cycle(SHAPES.values())
    for shape, kernels.schedule in zip(shapes, SEARCHING, strict=False):
        for training in (True, False):
            sample = make_sample(form, *shape, dtype, training)
            _, mask = kernels.forward(
                form, sample.x, sample.norm, sample.residual, sample.residual_norm
            )
            passes = sample.expected["z"] > 0 if mask is None else unpack_mask(mask)
            dz = torch.where(passes[:, : shape[1]], sample.grad, 0)
            inputs = [(sample.x, sample.norm), (sample.residual, sample.residual_norm)]
            centred = [x.double() - norm.mean for x, norm in inputs[: 1 + dual]]
            sums = torch.stack([dz.double(), *(dz.double() * c for c in centred)]).sum(1).float()
            residual = (sample.residual, sample.residual_norm) if dual else (None, None)
            found = kernels.backward_of_sums(dz, sums, sample.x, sample.norm, *residual, training)
            for name, value in found.items():
                if value is None:
                    continue
                whole = name in ("dx", "dresidual")
                torch.testing.assert_close(
                    value.double(),
                    sample.expected[name],
                    rtol=RELATIVE[dtype] if whole else SUM_RELATIVE,
                    atol=ABSOLUTE if whole else SUM_ABSOLUTE,
                )


def test_scale(kernels: BatchNormKernels) -> None:
    sizes = itertools.cycle((1, 255, 256, 257, 600))
    for channels, kernels.schedule in zip(sizes, SEARCHING, strict=False):
        norm = make_norm(torch.randn(5, channels), torch.Generator().manual_seed(0), False)
        expected = norm.weight.double() / (norm.var.double() + norm.eps).sqrt()
        torch.testing.assert_close(kernels.scale(norm).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_nan_passes_as_in_torch(kernels: BatchNormKernels, form: str) -> None:
    sample = make_sample(form, 20, 8, torch.float32, training=False)
    sample.x[3, 5] = float("nan")
    sample.x[4, 6] = float("inf")
    results = run_sample(kernels, form, sample, False)
    assert torch.isnan(results["out"][3, 5])
    assert torch.isnan(results["out"]).sum() == 1
    if "mask" in results:
        assert unpack_mask(results["mask"])[3, 5]


def test_addresses_of_any_alignment(kernels: BatchNormKernels) -> None:
    """Rows of whole words that start beside a word boundary take the path of single values."""
    sample = make_sample("bn", 40, 16, torch.bfloat16, training=True)
    shifted = torch.empty(40 * 16 + 1, dtype=torch.bfloat16)[1:].view(40, 16).copy_(sample.x)
    assert shifted.data_ptr() % 16 != 0
    for x in (sample.x, shifted):
        out, _ = kernels.forward("bn", x, sample.norm, None, None)
        torch.testing.assert_close(
            out.double(), sample.expected["out"], rtol=RELATIVE[torch.bfloat16], atol=ABSOLUTE
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pass_reads_and_writes_its_tensors_once(
    kernels: BatchNormKernels, dtype: torch.dtype
) -> None:
    rows, channels = 1024, 64
    tensor, mask = rows * channels * dtype.itemsize, rows * channels // 8
    vectors = 64 * 1024  # coefficients and partial sums, of all blocks together

    def moved(loads: int, stores: int) -> bool:
        """Whether threads, warps and the memory behind the caches all see no more than that.

        A thread's octet of float32 is two accesses of half a sector, so warps see each twice.
        """
        for count, expected in zip(kernels.traffic, (loads, stores), strict=True):
            transactions = count.transactions // (2 if dtype == torch.float32 else 1)
            for measure in (count.bytes, 32 * transactions, 32 * count.sectors):
                if not -vectors < measure - expected < vectors or count.bytes < expected:
                    return False
        return True

    for form, two_gradients in itertools.product(FORMS, (False, True)):
        if two_gradients and "add" not in form:
            continue
        sample = make_sample(form, rows, channels, dtype, True, two_gradients=two_gradients)
        residual = 1 if "add" in form else 0
        dual = 1 if form == "bn_add_bn_relu" else 0
        kernels.stats(sample.x)
        assert moved(tensor, 0)
        operands = (sample.x, sample.norm, sample.residual, sample.residual_norm)
        _, bits = kernels.forward(form, *operands)
        assert moved((1 + residual) * tensor, tensor + residual * mask), form
        kernels.backward(form, sample.grad, bits, *operands, True, sample.shortcut_grad)
        first = (2 + two_gradients + dual) * tensor + residual * mask
        second = (2 + dual) * tensor
        assert moved(first + second, (1 + residual + dual) * tensor), (form, two_gradients)


# ---- Mistakes that must be noticed.


def is_noticed(kernels: BatchNormKernels, schedules: list[Schedule]) -> bool:
    """Whether any check fails on some form under one of the schedules."""
    kernels.multiprocessors = 2
    for schedule, form in itertools.product(schedules, ["bn_relu", "bn_add_bn_relu"]):
        kernels.schedule = schedule
        # Four blocks share each column of channels, so they need the tickets.
        sample = make_sample(form, 1100, 64, torch.bfloat16, training=True)
        try:
            check_sample(run_sample(kernels, form, sample, True), sample)
        except (AssertionError, EmulatorError):
            return True
    return False


def test_stores_are_fenced_before_the_ticket(kernels: BatchNormKernels) -> None:
    """The fence behind the ticket orders loads, which the emulator never reorders: that one is
    looked for in the machine code (`tests/test_cuda_build.py`)."""
    assert not is_noticed(kernels, SCHEDULES[:2])
    before, _behind = kernels.fences()
    kernels.skipped_line = before
    assert is_noticed(kernels, SEARCHING)


def test_each_barrier_is_needed(kernels: BatchNormKernels) -> None:
    """Without any one of its barriers the code is wrong, and the schedules here find out."""
    assert not is_noticed(kernels, SCHEDULES[:2])
    barriers = kernels.barriers()
    assert len(barriers) >= 4
    unnoticed = []
    for line in barriers:
        kernels.skipped_line = line
        if not is_noticed(kernels, SEARCHING):
            unnoticed.append(line)
    assert not unnoticed, f"no schedule misses the barriers of lines {unnoticed}"


@pytest.mark.parametrize("error", [-1, 1])
def test_wrong_tickets_are_noticed(kernels: BatchNormKernels, error: int) -> None:
    kernels.ticket_error = error
    assert is_noticed(kernels, SEARCHING)


def test_tickets_that_do_not_start_at_zero_are_noticed(kernels: BatchNormKernels) -> None:
    kernels.skip_memset = True
    assert is_noticed(kernels, SCHEDULES)
