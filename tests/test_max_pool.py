# SPDX-License-Identifier: Apache-2.0
"""Batch norm, ReLU and max-pool as one operator against its twin in float64, with torch's own error
as the yardstick, and the module that uses it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import channels_last
from tolerances import assert_no_worse
from torch import Tensor, nn

import fastresnet
from fastresnet import ops
from fastresnet.nn.stem import pooled_stem
from fastresnet.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Named by what they try.
SHAPES = {
    "whole_vectors": (2, 64, 14, 10),
    "tail": (3, 19, 7, 9),
    "fewer_channels_than_lanes": (2, 3, 8, 8),
    "one_channel": (4, 1, 9, 6),
    "one_pixel": (16, 48, 1, 1),
    "one_row": (4, 20, 1, 13),
    "several_sums_a_row": (1, 8, 5, 300),
    "all_threads": (4, 64, 40, 40),
}
# kernel size, stride, padding
WINDOWS = {
    "3x3/2": (3, 2, 1),
    "3x3": (3, 1, 1),
    "3x3/2_unpadded": (3, 2, 0),
    "2x2/2": (2, 2, 0),
    "2x2/2_padded": (2, 2, 1),
    "pixels_under_no_window": (2, 3, 0),
    "1x1": (1, 1, 0),
    "5x5/3": (5, 3, 2),
    "15x15": (15, 1, 7),
}


@pytest.fixture(autouse=True)
def kernels_at_every_level(monkeypatch):
    """The kernels are to be right on every level, also where torch's are preferred."""
    monkeypatch.setattr(ops.max_pool, "_LEVELS", torch.ops.fastresnet.isa_levels())


def names(windows: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("kernel_size", "stride", "padding"), windows, strict=True))


def pooled_size(shape: tuple[int, ...], windows: tuple[int, int, int]) -> tuple[int, ...]:
    kernel, stride, padding = windows
    return *shape[:2], *((side + 2 * padding - kernel) // stride + 1 for side in shape[2:])


CASES = {  # those where a window fits
    f"{shape}-{windows}": (SHAPES[shape], WINDOWS[windows])
    for shape in SHAPES
    for windows in WINDOWS
    if min(pooled_size(SHAPES[shape], WINDOWS[windows])) >= 1
}


def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Differentiable leaves of one call, by name; the weight of either sign."""
    channels = shape[1]
    return {
        "x": (channels_last(*shape) * 1.5 + 0.3).to(dtype),
        "weight": (torch.rand(channels) + 0.5) * (torch.arange(channels) % 3 - 0.5).sign(),
        "bias": torch.randn(channels),
    }


def run(module, leaves, windows, grad: Tensor, training: bool) -> dict[str, Tensor]:
    """Output and gradients of ``module.bn_relu_max_pool``."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    if training:
        mean, var = module.bn_stats(leaves["x"])
    else:
        mean = torch.linspace(-1, 1, leaves["x"].shape[1]).to(leaves["weight"].dtype)
        var = mean.abs() + 0.5
    out = module.bn_relu_max_pool(**leaves, mean=mean, var=var, **names(windows), training=training)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    results = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "var": var, **results}


def check_against_float64(shape, windows, dtype, training: bool) -> None:
    leaves = arguments(shape, dtype)
    grad = channels_last(*pooled_size(shape, windows), dtype=dtype)
    assert ops.has_max_pool_kernel(leaves["x"], **names(windows))
    exact_leaves = {name: leaf.double() for name, leaf in leaves.items()}
    exact = run(reference, exact_leaves, windows, grad.double(), training)
    torchs = run(reference, leaves, windows, grad, training)
    ours = run(ops, leaves, windows, grad, training)
    inverse_std = max(1.0, (exact.pop("var") + 1e-5).rsqrt().max().item())
    # A pixel's gradient is a sum over the windows that it wins, times weight / std.
    kernel, stride, _ = windows
    wins = min(-(-kernel // stride), *grad.shape[2:]) ** 2
    rows = grad.numel() / shape[1]
    scales = {
        "out": exact["out"].abs().max().item(),
        "dx": inverse_std * wins**0.5,
        "dweight": rows,
        "dbias": rows,
    }
    for name, value in exact.items():
        assert ours[name].dtype == torchs[name].dtype, name
        assert ours[name].stride() == torchs[name].stride() or name in ("out", "dx"), name
        assert_no_worse(ours[name], torchs[name], value, name, scales[name])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "windows"), CASES.values(), ids=CASES)
def test_values_and_gradients(shape, windows, dtype, training):
    check_against_float64(shape, windows, dtype, training)


@settings(max_examples=100)
@given(
    shape=st.tuples(
        st.integers(1, 4), st.integers(1, 70), st.integers(1, 17), st.integers(1, 17)
    ).filter(lambda s: s[0] * s[2] * s[3] >= 4),
    kernel=st.integers(1, 15),
    stride=st.integers(1, 6),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
)
def test_random_shapes(shape, kernel, stride, data, dtype, training):
    padding = data.draw(st.integers(0, kernel // 2))
    windows = (kernel, stride, padding)
    if min(pooled_size(shape, windows)) >= 1:
        check_against_float64(shape, windows, dtype, training)


def exactly(x: Tensor, windows=(3, 2, 1), grad: Tensor | None = None):
    """Output and gradient of ``x`` of ours and of torch, batch norm being the identity."""
    channels = x.shape[1]
    vectors = torch.zeros(channels), torch.ones(channels), None, None
    results = []
    for module in (ops, reference):
        leaf = x.detach().requires_grad_()
        out = module.bn_relu_max_pool(leaf, *vectors, **names(windows), eps=0.0, training=False)
        if grad is None:
            grad = torch.arange(1, out.numel() + 1).reshape(out.shape).to(x.dtype)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, grad)))
    return results


@pytest.mark.parametrize("windows", [(3, 2, 1), (2, 2, 0), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("channels", [64, 19])
def test_of_equal_values_the_first_gets_the_gradient(channels, windows):
    x = torch.randint(-1, 3, (2, channels, 11, 9)).float()
    (out, dx), (torchs_out, torchs_dx) = exactly(
        x.contiguous(memory_format=torch.channels_last), windows
    )
    assert torch.equal(out, torchs_out)
    assert torch.equal(dx, torchs_dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_as_in_torch(value, dtype):
    x = torch.randint(-3, 4, (2, 20, 9, 9)).to(dtype)
    x[torch.rand(x.shape) < 0.2] = value
    grad = torch.randint(1, 4, (2, 20, 5, 5)).to(dtype)
    (out, dx), (torchs_out, torchs_dx) = exactly(
        x.contiguous(memory_format=torch.channels_last), grad=grad
    )
    torch.testing.assert_close(out, torchs_out, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dx, torchs_dx, rtol=0, atol=0, equal_nan=True)


def test_nothing_passes_where_a_whole_window_is_negative():
    x = -torch.rand(2, 33, 8, 8).contiguous(memory_format=torch.channels_last)
    infinite = torch.full((2, 33, 4, 4), float("inf"))
    (out, dx), _ = exactly(x, grad=infinite)
    assert not out.any()
    assert not dx.any()


def test_infinite_gradients_stay_in_their_windows():
    x = channels_last(1, 16, 8, 8)
    grad = torch.zeros(1, 16, 4, 4)
    grad[:, :, 0, 0] = float("inf")
    (_, dx), (_, torchs_dx) = exactly(x, (2, 2, 0), grad)
    torch.testing.assert_close(dx, torchs_dx, rtol=0, atol=0, equal_nan=True)


def test_a_weight_of_zero():
    leaves = arguments((2, 24, 8, 8), torch.float32)
    leaves["weight"].zero_()
    grad = channels_last(2, 24, 4, 4)
    results = [run(module, leaves, (3, 2, 1), grad, True) for module in (ops, reference)]
    for name in ("out", "dx", "dweight", "dbias"):
        torch.testing.assert_close(results[0][name], results[1][name], msg=name)


def test_index_is_the_position_in_the_window_or_255():
    x = channels_last(2, 21, 9, 7)
    zero, one = torch.zeros(21), torch.ones(21)
    out, index = torch.ops.fastresnet.bn_relu_max_pool.default(
        x, zero, one, one, zero, 3, 2, 1, 0.0, False
    )
    _, flat = nn.functional.max_pool2d(x, 3, 2, 1, return_indices=True)
    row, column = flat // 7, flat % 7
    top = 2 * torch.arange(out.shape[2])[:, None] - 1
    left = 2 * torch.arange(out.shape[3]) - 1
    expected = torch.where(out > 0, (row - top) * 3 + column - left, 255)
    assert index.dtype == torch.uint8
    assert torch.equal(index.long(), expected)


def test_saved_for_backward_are_x_a_byte_a_value_and_vectors():
    x = channels_last(2, 16, 12, 12).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        ops.bn_relu_max_pool(
            x, *ops.bn_stats(x), torch.ones(16), torch.zeros(16), **names((3, 2, 1)), training=True
        )
    large = [(tensor.dtype, tensor.numel()) for tensor in saved if tensor.dim() > 1]
    assert sorted(large, key=lambda pair: pair[1]) == [
        (torch.uint8, 2 * 16 * 6 * 6),
        (torch.float32, x.numel()),
    ]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_results_are_the_same_from_run_to_run(training):
    leaves = arguments((8, 64, 32, 32), torch.float32)
    grad = channels_last(8, 64, 16, 16)
    first, second = (run(ops, leaves, (3, 2, 1), grad, training) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_gradient_of_any_layout():
    leaves = arguments((2, 16, 8, 8), torch.float32)
    nchw = torch.randn(2, 16, 4, 4)
    for grad in (nchw, torch.randn(2, 16, 1, 1).expand(2, 16, 4, 4), nchw.transpose(2, 3)):
        dense = grad.clone(memory_format=torch.channels_last)
        ours, expected = (run(ops, leaves, (3, 2, 1), g, True) for g in (grad, dense))
        assert torch.equal(ours["dx"], expected["dx"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(dtype, requires_grad):
    for shape, windows in (((2, 12, 8, 6), (3, 2, 1)), ((2, 12, 2, 2), (2, 2, 0))):
        leaves = arguments(shape, dtype)
        vectors = [torch.zeros(12), torch.ones(12), leaves["weight"], leaves["bias"]]
        x = leaves["x"]
        grad = channels_last(*pooled_size(shape, windows), dtype=dtype)
        if requires_grad:
            for leaf in leaves.values():
                leaf.requires_grad_()
        rest = (*windows, 1e-5, True)
        operator = torch.ops.fastresnet.bn_relu_max_pool.default
        torch.library.opcheck(operator, (x, *vectors, *rest))
        _, index = operator(x.detach(), *(vector.detach() for vector in vectors), *rest)
        torch.library.opcheck(
            torch.ops.fastresnet.bn_relu_max_pool_backward.default,
            (grad, index, x.detach(), *vectors[:2], vectors[2].detach(), *rest),
        )


def test_double_backward_is_refused():
    x = channels_last(2, 6, 4, 4).requires_grad_()
    vectors = torch.zeros(6), torch.ones(6), None, None
    out = ops.bn_relu_max_pool(x, *vectors, **names((3, 2, 1)), training=False)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("x", "windows"),
    [
        (torch.randn(2, 6, 8, 8), (3, 2, 1)),
        (channels_last(2, 6, 8, 8).double(), (3, 2, 1)),
        (channels_last(2, 6, 20, 20), (16, 2, 1)),
    ],
    ids=["nchw", "float64", "large_windows"],
)
def test_what_the_kernel_does_not_take_runs_on_torch(x, windows):
    assert not ops.has_max_pool_kernel(x, **names(windows))
    arguments = (x, torch.zeros(6), torch.ones(6), None, None)
    ours, torchs = (
        module.bn_relu_max_pool(*arguments, **names(windows), training=False)
        for module in (ops, reference)
    )
    assert torch.equal(ours, torchs)


@pytest.mark.parametrize(
    ("windows", "message"),
    [((3, 2, 2), "at most half of"), ((9, 2, 0), "too small"), ((3, -1, 1), "stride")],
    ids=["padding", "window", "stride"],
)
def test_bad_windows_are_refused_in_torchs_words(windows, message):
    arguments = (channels_last(2, 6, 8, 8), torch.zeros(6), torch.ones(6), None, None)
    with pytest.raises(RuntimeError, match=message):
        ops.bn_relu_max_pool(*arguments, **names(windows), training=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 6, 8, 8)}, "expected x to be dense in channels_last"),
        ({"mean": torch.ones(5)}, r"expected mean of 6 values, one a channel, got \[5\]"),
        ({"kernel_size": 16}, "expected a kernel_size of 1 to 15, got 16"),
        ({"stride": 0}, "expected a stride of 1 or more, got 0"),
        ({"padding": 2}, "expected a padding of at most half the kernel_size, got 2"),
        ({"kernel_size": 11}, r"expected x of at least the window's size, got \[2, 6, 8, 8\]"),
    ],
    ids=["nchw", "mean", "kernel_size", "stride", "padding", "window"],
)
def test_the_bare_operator_refuses_bad_arguments(change, message):
    vectors = dict.fromkeys(("mean", "var", "weight", "bias"), torch.ones(6))
    given = {"x": channels_last(2, 6, 8, 8), **vectors, **names((3, 2, 1))} | change
    with pytest.raises(ValueError, match=f"bn_relu_max_pool: {message}"):
        torch.ops.fastresnet.bn_relu_max_pool.default(**given, eps=1e-5, training=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": channels_last(2, 6, 8, 8)}, r"grad of shape \[2, 6, 4, 4\], got \[2, 6, 8, 8\]"),
        ({"grad": channels_last(2, 6, 4, 4).double()}, "expected grad of Float, got Double"),
        ({"grad": torch.randn(2, 6, 4, 4)}, "expected grad to be dense in channels_last"),
        ({"index": channels_last(2, 6, 4, 4)}, "expected index of Byte, got Float"),
    ],
    ids=["shape", "dtype", "nchw", "index"],
)
def test_the_bare_backward_refuses_bad_arguments(change, message):
    vectors = dict.fromkeys(("mean", "var", "weight"), torch.ones(6))
    grad = channels_last(2, 6, 4, 4)
    given = {"grad": grad, "index": grad.to(torch.uint8), "x": channels_last(2, 6, 8, 8)}
    given |= {**vectors, **names((3, 2, 1))} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.fastresnet.bn_relu_max_pool_backward.default(**given, eps=1e-5, training=True)


# The modules


def stem(**pool) -> tuple[nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]:
    bn = nn.BatchNorm2d(24)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)
    windows = {"kernel_size": 3, "stride": 2, "padding": 1} | pool
    return bn, nn.ReLU(inplace=True), nn.MaxPool2d(**windows)


def is_fused(out: Tensor) -> bool:
    """Whether the operator is in what led to ``out``."""
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes.extend(parent for parent, _ in node.next_functions if parent is not None)
    return any("bn_relu_max_pool" in name for name in names)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False], ids=["tracks", "does_not_track"])
def test_modules_behave_as_torchs(training, momentum, track):
    bn, relu, pool = stem()
    if not track:
        bn = nn.BatchNorm2d(24, momentum=momentum, track_running_stats=False)
    bn.momentum = momentum
    theirs = copy.deepcopy(bn).train(training)
    bn.train(training)
    for _ in range(2):  # running statistics of several steps, gradients that accumulate
        x = channels_last(3, 24, 10, 9)
        leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
        out, _ = pooled_stem(bn, relu, pool, leaves[0])
        expected = pool(relu(theirs(leaves[1])))
        assert is_fused(out)
        torch.testing.assert_close(out, expected)
        grad = torch.randn(out.shape)
        out.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)
    for (name, ours), wanted in zip(
        bn.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, wanted, msg=name)
    for ours, wanted in zip(bn.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_used_twice():
    bn, relu, pool = stem()
    theirs = copy.deepcopy(bn)
    inputs = [channels_last(2, 24, 8, 8) for _ in range(2)]
    sum(pooled_stem(bn, relu, pool, x)[0].sum() for x in inputs).backward()
    sum(pool(relu(theirs(x))).sum() for x in inputs).backward()
    torch.testing.assert_close(bn.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
    assert bn.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("windows", "fused"),
    [
        ({}, True),
        ({"kernel_size": (3, 3), "stride": [2, 2], "padding": (1, 1), "dilation": (1, 1)}, True),
        ({"kernel_size": 2, "stride": None, "padding": 0}, True),
        ({"ceil_mode": True}, False),
        ({"dilation": 2}, False),
        ({"kernel_size": (3, 2)}, False),
        ({"stride": (2, 1)}, False),
        ({"kernel_size": 17, "padding": 8}, False),
    ],
    ids=str,
)
def test_which_windows_are_fused(windows, fused):
    bn, relu, pool = stem(**windows)
    theirs = copy.deepcopy(bn)
    x = channels_last(2, 24, 12, 12).requires_grad_()
    out, _ = pooled_stem(bn, relu, pool, x)
    assert is_fused(out) == fused
    torch.testing.assert_close(out, pool(relu(theirs(x))))


def test_what_is_not_plain_runs_as_before():
    x = channels_last(2, 24, 8, 8).requires_grad_()
    for index in range(3):
        modules = stem()
        seen = []
        modules[index].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert not is_fused(pooled_stem(*modules, x)[0])
        assert seen == [1]
    bn, relu, pool = stem()
    assert not is_fused(pooled_stem(bn, nn.ReLU6(), pool, x)[0])
    assert torch.equal(pooled_stem(nn.Identity(), nn.ReLU(), nn.Identity(), x)[0], x.relu())
    (out, indices), _ = pooled_stem(bn, relu, nn.MaxPool2d(3, return_indices=True), x)
    assert out.shape == indices.shape


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_runs_it(autocast):
    model = fastresnet.models.resnet18(num_classes=4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert is_fused(model(torch.randn(2, 3, 64, 64, requires_grad=True)))
    assert model.bn1.num_batches_tracked == 1
    cifar = fastresnet.models.cifar_resnet18()
    assert not is_fused(cifar(torch.randn(2, 3, 32, 32, requires_grad=True)))
