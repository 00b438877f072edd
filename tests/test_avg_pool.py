# SPDX-License-Identifier: Apache-2.0
"""The average over a map against its twin in float64, with torch's own error as the yardstick, and
the place in a network that uses it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import channels_last
from tolerances import assert_no_worse
from torch import Tensor, nn

from fastresnet import models, ops
from fastresnet.nn.average_pool import average_pool
from fastresnet.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Named by what they try.
SHAPES = {
    "resnet50": (2, 2048, 7, 7),
    "tail": (3, 19, 7, 9),
    "whole_vectors_and_a_tail": (2, 213, 3, 5),
    "fewer_channels_than_lanes": (2, 3, 8, 8),
    "one_channel": (4, 1, 9, 6),
    "one_pixel": (16, 48, 1, 1),
    "one_row": (4, 20, 1, 13),
    "long_sums": (1, 8, 40, 300),
    "all_threads": (4, 64, 40, 40),
}


def run(module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradient of ``module.global_avg_pool``."""
    leaf = x.detach().requires_grad_()
    out = module.global_avg_pool(leaf)
    return {"out": out.detach(), "dx": torch.autograd.grad(out, leaf, grad)[0]}


def check_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = channels_last(*shape) + 0.3, torch.randn(*shape[:2], 1, 1).to(dtype)
    x = x.to(dtype)
    assert ops.has_kernel(x)
    exact = run(reference, x.double(), grad.double())
    torchs, ours = run(reference, x, grad), run(ops, x, grad)
    for name, value in exact.items():
        assert ours[name].dtype == dtype, name
        assert ours[name].shape == value.shape, name
        assert_no_worse(ours[name], torchs[name], value, name, value.abs().max().item())
    assert ours["dx"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, dtype):
    check_against_float64(shape, dtype)


@settings(max_examples=100)
@given(
    shape=st.tuples(
        st.integers(1, 5), st.integers(1, 150), st.integers(1, 17), st.integers(1, 17)
    ).filter(lambda s: s[0] * s[2] * s[3] >= 2),
    dtype=st.sampled_from(DTYPES),
)
def test_random_shapes(shape, dtype):
    check_against_float64(shape, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_stay_in_their_channel(value):
    x = channels_last(2, 20, 5, 5)
    x[1, 7, 2, 3] = value
    out = ops.global_avg_pool(x)
    torch.testing.assert_close(out, reference.global_avg_pool(x), equal_nan=True)
    assert out.isfinite().sum() == out.numel() - 1


def test_gradient_of_any_layout():
    x = channels_last(3, 24, 4, 5)
    for grad in (torch.randn(24, 3).t()[..., None, None], torch.randn(1).expand(3, 24, 1, 1)):
        assert torch.equal(run(ops, x, grad)["dx"], run(ops, x, grad.contiguous())["dx"])


def test_saves_nothing_for_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        ops.global_avg_pool(channels_last(2, 16, 3, 3).requires_grad_())
    assert not saved


def test_can_be_differentiated_twice():
    x = channels_last(2, 6, 3, 4).requires_grad_()

    def penalty(module) -> Tensor:
        (dx,) = torch.autograd.grad(module.global_avg_pool(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(ops), penalty(reference))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(dtype, requires_grad):
    x = channels_last(2, 12, 3, 5, dtype=dtype).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.fastresnet.global_avg_pool.default, (x,))
    grad = torch.randn(2, 12, 1, 1).to(dtype).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.fastresnet.global_avg_pool_backward.default, (grad, 3, 5))


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 6, 8, 8), channels_last(2, 6, 8, 8).double(), torch.randn(6, 8, 8)],
    ids=["nchw", "float64", "no_batch"],
)
def test_what_the_kernel_does_not_take_runs_on_torch(x):
    assert not ops.has_kernel(x)
    assert torch.equal(ops.global_avg_pool(x), reference.global_avg_pool(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 6, 8, 8), "expected x to be dense in channels_last"),
        (torch.randn(2, 6, 8), r"expected x of 4 dimensions .* got shape \[2, 6, 8\]"),
        (channels_last(2, 6, 8, 8).double(), "expected x of float32, bfloat16 or float16"),
    ],
    ids=["nchw", "no_batch", "float64"],
)
def test_the_bare_operator_refuses_bad_arguments(x, message):
    with pytest.raises(ValueError, match=f"global_avg_pool: {message}"):
        torch.ops.fastresnet.global_avg_pool.default(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (channels_last(2, 6, 2, 1), 3, 3),
            r"expected grad of shape \[N, C, 1, 1\], got \[2, 6, 2",
        ),
        ((torch.randn(2, 6), 3, 3), "expected grad of 4 dimensions"),
        ((torch.randn(2, 6, 1, 1), 3, 0), "expected height and width of 1 or more, got 3 and 0"),
    ],
    ids=["shape", "dimensions", "sides"],
)
def test_the_bare_backward_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"global_avg_pool_backward: {message}"):
        torch.ops.fastresnet.global_avg_pool_backward.default(*arguments)


# In a network


def is_ours(out: Tensor) -> bool:
    return "global_avg_pool" in out.grad_fn.name()


@pytest.mark.parametrize(
    ("pool", "ours"),
    [
        (nn.AdaptiveAvgPool2d(1), True),
        (nn.AdaptiveAvgPool2d((1, 1)), True),
        (nn.AdaptiveAvgPool2d(2), False),
        (nn.AdaptiveAvgPool2d((1, None)), False),
        (nn.AvgPool2d(4), False),
        (nn.Identity(), False),
    ],
    ids=str,
)
def test_replaces_the_average_over_whole_maps(pool, ours):
    x = channels_last(2, 16, 4, 4).requires_grad_() * 1
    out = average_pool(pool, x)
    assert is_ours(out) == ours
    torch.testing.assert_close(out, pool(x))


def test_hooks_are_called():
    pool, seen = nn.AdaptiveAvgPool2d(1), []
    pool.register_forward_hook(lambda *_: seen.append(1))
    assert not is_ours(average_pool(pool, channels_last(2, 16, 4, 4).requires_grad_() * 1))
    assert seen


def test_a_subclass_runs_itself():
    class Doubled(nn.AdaptiveAvgPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = channels_last(2, 16, 4, 4)
    assert torch.equal(average_pool(Doubled(1), x), Doubled(1)(x))


def test_function_transforms_see_torchs():
    pool, x = nn.AdaptiveAvgPool2d(1), channels_last(3, 8, 4, 4)
    out, tangent = torch.func.jvp(lambda image: average_pool(pool, image), (x,), (x,))
    torch.testing.assert_close(tangent, pool(x))
    torch.testing.assert_close(out, pool(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_blocks_gradient_comes_as_its_kernels_read_it(dtype):
    """No copy to channels_last between the classifier and the last block."""
    model = models.resnet18(num_classes=4).to(memory_format=torch.channels_last)
    layouts = []

    def record(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        layouts.append(output.dtype)
        output.register_hook(
            lambda grad: layouts.append(grad.is_contiguous(memory_format=torch.channels_last))
        )

    model.layer4.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(channels_last(2, 3, 64, 64)).sum().backward()
    assert layouts == [dtype, True]
