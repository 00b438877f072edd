# SPDX-License-Identifier: Apache-2.0
"""Every ISA level that this machine has computes the same, and FASTRESNET_ISA chooses it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest
import torch

import fastresnet  # noqa: F401

LEVELS = torch.ops.fastresnet.isa_levels()

# Runs one step of every form and dtype and saves what came out.
STEP = """
import sys, torch
from fastresnet import ops
torch.manual_seed(0)
results = {"isa": torch.ops.fastresnet.isa()}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for channels in (64, 19):
        x, residual, grad = (
            torch.randn(4, channels, 9, 7).to(dtype).contiguous(memory_format=torch.channels_last)
            for _ in range(3)
        )
        x, residual = x.requires_grad_(), residual.requires_grad_()
        mean, var = ops.bn_stats(x)
        residual_mean, residual_var = ops.bn_stats(residual)
        one, zero = torch.ones(channels), torch.zeros(channels)
        bn = (x, mean, var, one, zero)
        outs = {
            "bn": ops.bn(*bn, training=True),
            "bn_relu": ops.bn_relu(*bn, training=True),
            "bn_add_relu": ops.bn_add_relu(*bn, residual, training=True),
            "bn_add_bn_relu": ops.bn_add_bn_relu(
                *bn, residual, residual_mean, residual_var, one, zero, training=True
            ),
        }
        for form, out in outs.items():
            wanted = [x, residual] if "add" in form else [x]
            gradients = torch.autograd.grad(out, wanted, grad, retain_graph=True)
            key = f"{form} {dtype} {channels}"
            results[key] = [mean, var, out.detach(), *gradients]
        conv, backward = torch.ops.fastresnet.conv_stats, torch.ops.fastresnet.conv_bn_backward
        x, residual = x.detach(), residual.detach()
        weight = (torch.randn(40, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)
        prologue = (mean, var, one, zero, 1e-5)
        many = torch.randn(30, channels, 9, 7).to(dtype)
        many = many.contiguous(memory_format=torch.channels_last)
        # By the sum over taps, and (many tiles, stride 1) by minimal filtering.
        for x, stride, size in ((x, 2, 1.0), (many, 1, 0.25)):
            y, y_mean, y_var = conv(x, *prologue, weight, stride, 1, 1, 1)
            y_grad, y_one = torch.full_like(y, size), torch.ones(40)
            sums, _ = torch.ops.fastresnet.bn_sums(y_grad, None, y, y_mean, None, None)
            dx, dweight, *_ = backward(
                *(y_grad, None, sums, y, y_mean, y_var, y_one, 1e-5, False, x, *prologue, weight),
                *(None, None, stride, 1, 1, 1, True),
            )
            # In evaluation mode the gradient of y is the same everywhere on a channel; sums of many
            # terms are brought to the size of one.
            rows = y.numel() / 40
            found = (y, y_mean, y_var, dx, dweight / rows)
            results[f"conv/{stride} {dtype} {channels}"] = [tensor.to(dtype) for tensor in found]
        # Integers, many of them equal, and NaN: exact, so that every position must be the same.
        x = torch.randint(-3, 4, (3, channels, 11, 8)).to(dtype)
        x[torch.rand(x.shape) < 0.02] = float("nan")
        x = x.contiguous(memory_format=torch.channels_last)
        bn = (torch.zeros(channels), one, -one, one)
        pool, backward = (
            torch.ops.fastresnet.bn_relu_max_pool,
            torch.ops.fastresnet.bn_relu_max_pool_backward,
        )
        for windows in ((3, 2, 1), (2, 2, 0), (5, 1, 2)):
            out, index = pool(x, *bn, *windows, 0.0, False)
            grad = torch.randint_like(out, -3, 4)
            dx, *_ = backward(grad, index, x, *bn[:3], *windows, 0.0, False)
            results[f"bn_relu_max_pool {dtype} {channels} {windows}"] = [out, index.to(dtype), dx]
        out = torch.ops.fastresnet.global_avg_pool(many)
        dx = torch.ops.fastresnet.global_avg_pool_backward(out, 9, 7)
        results[f"global_avg_pool {dtype} {channels}"] = [out, dx]
    # What is large is written past the caches.
    large = torch.randn(9, 64, 31, 61).to(dtype).contiguous(memory_format=torch.channels_last)
    assert large.numel() * large.element_size() >= 2**21
    bn = (*ops.bn_stats(large), torch.ones(64), torch.zeros(64))
    weight = (torch.randn(64, 64, 1, 1) / 8).to(dtype)
    y, y_mean, y_var = torch.ops.fastresnet.conv_stats(large, *bn, 1e-5, weight, 1, 0, 1, 1)
    y_grad = large / 4  # gradients up to 9 come down to the size of one
    sums, _ = torch.ops.fastresnet.bn_sums(y_grad, None, y, y_mean, None, None)
    dx, *_ = torch.ops.fastresnet.conv_bn_backward(
        *(y_grad, None, sums, y, y_mean, y_var, bn[2], 1e-5, True, large, *bn, 1e-5, weight),
        *(None, None, 1, 0, 1, 1, True),
    )
    results[f"large {dtype}"] = [ops.bn_relu(large, *bn, training=True), y, dx]
torch.save(results, sys.argv[1])
"""


def run(level: str, *args: str, code: str = STEP) -> subprocess.CompletedProcess[str]:
    # Not from the clone: `python -c` would find its fastresnet/, without the compiled libraries.
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTRESNET_ISA": level},
        cwd=tempfile.gettempdir(),
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isa")
    found = {}
    for level in LEVELS:
        done = run(level, str(folder / level))
        assert done.returncode == 0, done.stderr
        found[level] = torch.load(folder / level)
    return found


def test_there_is_a_level_for_any_processor():
    assert LEVELS[-1] == "default"
    assert torch.ops.fastresnet.isa() in LEVELS


@pytest.mark.skipif("FASTRESNET_ISA" in os.environ, reason="a level is forced")
def test_the_best_level_is_chosen():
    assert torch.ops.fastresnet.isa() == LEVELS[0]


# Prints the least time of a convolution in bfloat16, in seconds.
PRODUCTS = """
import time, torch, fastresnet
torch.set_num_threads(1)
x = torch.randn(8, 256, 14, 14).bfloat16().contiguous(memory_format=torch.channels_last)
weight = torch.randn(256, 256, 1, 1).bfloat16()
bn = (torch.zeros(256), torch.ones(256), torch.ones(256), torch.zeros(256), 1e-5)
times = []
for _ in range(200):
    start = time.perf_counter()
    torch.ops.fastresnet.conv_stats(x, *bn, weight, 1, 0, 1, 1)
    times.append(time.perf_counter() - start)
print(min(times))
"""


@pytest.mark.slow
def test_bfloat16_is_multiplied_by_the_faster_instructions():
    both = [level for level in LEVELS if level in ("avx512_bf16", "avx512")]
    if len(both) < 2:
        pytest.skip("this processor has no instructions for bfloat16")
    first, second = (float(run(level, code=PRODUCTS).stdout) for level in both)
    assert first < second


@pytest.mark.parametrize("level", LEVELS)
def test_a_forced_level_is_used_and_computes_the_same(results, level):
    assert results[level]["isa"] == level
    for name, expected in results["default"].items():
        if name == "isa":
            continue
        for ours, theirs in zip(results[level][name], expected, strict=True):
            # The levels differ in the order of sums and in fused multiply-adds, so a 16-bit result
            # may round to its neighbour.
            rounding = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(
                *(ours, theirs), rtol=2 * rounding, atol=8 * rounding, equal_nan=True, msg=name
            )


def test_an_unknown_level_is_refused_at_import():
    done = run("sse9", code="import fastresnet")
    assert done.returncode != 0
    known = "amx, avx512_bf16, avx512, avx2, default"
    if "avx512_bf16" in LEVELS and LEVELS.index("avx512") < LEVELS.index("avx512_bf16"):
        known = "amx, avx512, avx512_bf16, avx2, default"
    assert f"ValueError: FASTRESNET_ISA=sse9 is unknown; known levels: {known}\n" in done.stderr


def test_a_level_that_the_processor_lacks_is_refused():
    known = ["amx", "avx512_bf16", "avx512", "avx2"]
    lacking = next((level for level in known if level not in LEVELS), None)
    if lacking is None:
        pytest.skip("this processor has every level")
    done = run(lacking, code="import fastresnet")
    assert done.returncode != 0
    assert f"FASTRESNET_ISA={lacking}: this processor or system does not support" in done.stderr
