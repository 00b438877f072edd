# SPDX-License-Identifier: Apache-2.0
"""The batch-norm operators against their twins: values and gradients by dtype, form and shape, with
torch's own error to float64 as the yardstick."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import channels_last
from tolerances import assert_no_worse, error
from torch import Tensor

from fastresnet import ops
from fastresnet.ops import reference

FORMS = ["bn", "bn_relu", "bn_add_relu", "bn_add_bn_relu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Named by what they try: whole vectors of every ISA level, tails, one row, many threads' rows.
SHAPES = {
    "whole_vectors": (2, 64, 7, 5),
    "tail": (3, 19, 5, 3),
    "fewer_channels_than_lanes": (2, 3, 8, 8),
    "one_channel": (4, 1, 3, 3),
    "prime": (5, 37, 7, 11),
    "one_pixel": (16, 48, 1, 1),
    "one_image": (1, 32, 13, 9),
    "all_threads": (4, 64, 40, 40),
}


def arguments(shape: tuple[int, ...], dtype: torch.dtype, form: str, mean: float = 0.3) -> dict:
    """Differentiable leaves of one call, by name."""
    channels = shape[1]
    x = channels_last(*shape) * 1.5 + mean
    leaves = {
        "x": x.to(dtype),
        "weight": torch.rand(channels) + 0.5,
        "bias": torch.randn(channels),
    }
    if form == "bn_add_relu":
        leaves["residual"] = channels_last(*shape, dtype=dtype)
    if form == "bn_add_bn_relu":
        leaves["residual"] = (channels_last(*shape) + mean).to(dtype)
        leaves["residual_weight"] = torch.rand(channels) + 0.5
        leaves["residual_bias"] = torch.randn(channels)
    return leaves


def run(module, form: str, leaves: dict, grad: Tensor, training: bool) -> dict[str, Tensor]:
    """Output, statistics and gradients of ``module.<form>``."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    results = {}
    kwargs = dict(leaves)
    for prefix, of in (("", "x"), ("residual_", "residual")):
        if prefix and form != "bn_add_bn_relu":
            continue
        if training:
            mean, var = module.bn_stats(leaves[of])
        else:
            mean = torch.linspace(-1, 1, leaves["x"].shape[1]).to(leaves["weight"].dtype)
            var = mean.abs() + 0.5
        kwargs[f"{prefix}mean"], kwargs[f"{prefix}var"] = mean, var
        results[f"{prefix}mean"], results[f"{prefix}var"] = mean, var
    results["out"] = getattr(module, form)(**kwargs, training=training)
    gradients = torch.autograd.grad(results["out"], list(leaves.values()), grad)
    results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results


def check_against_float64(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, training: bool, mean: float = 0.3
) -> None:
    leaves = arguments(shape, dtype, form, mean)
    grad = channels_last(*shape, dtype=dtype)
    exact = run(
        reference,
        form,
        {name: leaf.double() for name, leaf in leaves.items()},
        grad.double(),
        training,
    )
    torchs = run(reference, form, leaves, grad, training)
    ours = run(ops, form, leaves, grad, training)
    rows = leaves["x"].numel() / shape[1]
    variances = [value for name, value in exact.items() if name.endswith("var")]
    inverse_std = max(1.0, (torch.stack(variances) + 1e-5).rsqrt().max().item())
    for name, value in exact.items():
        assert ours[name].dtype == torchs[name].dtype, name
        # A parameter's gradient sums over the rows terms of about 1; the input's is of about
        # weight / std, which a small variance of few rows makes large; others are what they are.
        scale = {"x": inverse_std, "residual": inverse_std}.get(name[1:], rows)
        if not name.startswith("d"):
            scale = value.abs().max().item()
        assert_no_worse(ours[name], torchs[name], value, name, scale)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, form, dtype, training):
    check_against_float64(shape, dtype, form, training)


@settings(max_examples=60)
@given(
    shape=st.tuples(
        st.integers(1, 4), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)
    ).filter(lambda s: s[0] * s[2] * s[3] >= 4),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(FORMS),
    training=st.booleans(),
)
def test_random_shapes(shape, dtype, form, training):
    check_against_float64(shape, dtype, form, training)


def test_large_mean():
    # Not behind a ReLU: which of the values next to zero fall on which side is then rounding.
    check_against_float64((8, 24, 16, 16), torch.float32, "bn", training=True, mean=1e3)


def test_statistics_of_a_large_mean():
    """Mean 1e3, standard deviation 1: a plain sum of squares would lose the variance."""
    x = channels_last(8, 33, 32, 32) + 1e3
    mean, var = ops.bn_stats(x)
    exact_mean, exact_var = reference.bn_stats(x.double())
    assert error(mean, exact_mean) <= torch.finfo(torch.float32).eps * 1e3
    assert error(var, exact_var) <= 1e-6


def test_statistics_of_one_outlier_in_the_first_row():
    """The shift of the sums comes from the first rows; a bad one must not cost the variance."""
    x = channels_last(4, 8, 32, 32)
    x[0, :, 0, 0] = 1e3
    _, var = ops.bn_stats(x)
    _, exact = reference.bn_stats(x.double())
    torch.testing.assert_close(var.double(), exact, rtol=1e-5, atol=0)


def test_a_constant_channel_has_no_variance():
    x = torch.full((2, 5, 4, 4), 0.1).contiguous(memory_format=torch.channels_last)
    mean, var = ops.bn_stats(x)
    torch.testing.assert_close(mean, torch.full((5,), 0.1))
    assert (var >= 0).all()
    assert (var < 1e-14).all()


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity_propagate_as_in_torch(form):
    leaves = arguments((2, 20, 4, 4), torch.float32, form)
    with torch.no_grad():
        leaves["x"][0, 3, 1, 1] = float("nan")
        leaves["x"][1, 17, 0, 2] = float("inf")
    grad = channels_last(2, 20, 4, 4)
    for training in (True, False):
        ours = run(ops, form, leaves, grad, training)
        torchs = run(reference, form, leaves, grad, training)
        for name in ("out", "dx", "dweight"):
            torch.testing.assert_close(
                ours[name].isnan(), torchs[name].isnan(), msg=f"{name}, training={training}"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(form, dtype, requires_grad):
    leaves = arguments((2, 12, 5, 3), dtype, form)
    if requires_grad:
        for leaf in leaves.values():
            leaf.requires_grad_()
    vectors = (torch.zeros(12), torch.ones(12), leaves["weight"], leaves["bias"])
    args = (leaves["x"], *vectors)
    eps: tuple[float, ...] = (1e-5,)
    if form == "bn_add_relu":
        args += (leaves["residual"],)
    if form == "bn_add_bn_relu":
        residual_vectors = (leaves["residual_weight"], leaves["residual_bias"])
        args += (leaves["residual"], *vectors[:2], *residual_vectors)
        eps = (1e-5, 1e-5)
    torch.library.opcheck(getattr(torch.ops.fastresnet, form).default, (*args, *eps, True))
    torch.library.opcheck(torch.ops.fastresnet.bn_stats.default, (leaves["x"].detach(),))


def test_results_are_the_same_from_run_to_run():
    leaves = arguments((8, 64, 32, 32), torch.float32, "bn_add_bn_relu")
    grad = channels_last(8, 64, 32, 32)
    first, second = (run(ops, "bn_add_bn_relu", leaves, grad, True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_gradient_of_any_layout():
    """A mean hands back an expanded gradient, a flatten a contiguous one."""
    leaves = arguments((2, 16, 4, 4), torch.float32, "bn_relu")
    nchw = torch.randn(2, 16, 4, 4)
    expanded = torch.randn(2, 16, 1, 1).expand(2, 16, 4, 4)
    for grad in (nchw, expanded, nchw.transpose(2, 3)):
        ours = run(ops, "bn_relu", leaves, grad, True)
        dense = run(ops, "bn_relu", leaves, grad.clone(memory_format=torch.channels_last), True)
        assert torch.equal(ours["dx"], dense["dx"])


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype_get_gradients_of_theirs(weight_dtype):
    leaves = arguments((2, 16, 4, 4), torch.bfloat16, "bn_relu")
    leaves |= {name: leaves[name].to(weight_dtype) for name in ("weight", "bias")}
    result = run(ops, "bn_relu", leaves, channels_last(2, 16, 4, 4, dtype=torch.bfloat16), True)
    assert result["dweight"].dtype == result["dbias"].dtype == weight_dtype


def test_without_weight_and_bias():
    x = channels_last(2, 16, 4, 4)
    mean, var = ops.bn_stats(x)
    torch.testing.assert_close(
        ops.bn(x, mean, var, None, None, training=True),
        reference.bn(x, mean, var, None, None, training=True),
    )


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 6, 4, 4),
        channels_last(2, 6, 4, 4).double(),
        channels_last(2, 12, 4, 4)[:, ::2],
        torch.randn(0, 6, 4, 4),
        torch.randn(1, 6, 1, 1),
    ],
    ids=["nchw", "float64", "strided", "empty", "one_value_a_channel"],
)
def test_what_the_kernels_do_not_take_runs_on_torch(x):
    assert not ops.has_kernel(x)
    mean, var = torch.zeros(6), torch.ones(6)
    out = ops.bn_relu(x, mean, var, None, None, training=False)
    assert torch.equal(out, reference.bn_relu(x, mean, var, None, None, training=False))
    assert out.stride() == x.stride() or not x.is_contiguous()


def test_one_value_a_channel_raises_as_torch_does():
    x = torch.randn(1, 6, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.bn_relu(x, torch.zeros(6), torch.ones(6), None, None, training=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"expected weight of 6 values, one a channel, got \[5\]"),
        ({"mean": torch.zeros(2, 3)}, r"expected mean of 6 values, one a channel, got \[2, 3\]"),
    ],
)
def test_wrong_vectors_are_named(change, message):
    vectors = {name: torch.ones(6) for name in ("mean", "var", "weight", "bias")} | change
    with pytest.raises(ValueError, match=message):
        ops.bn_relu(channels_last(2, 6, 4, 4), **vectors, training=True)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 6, 4, 4), "expected x to be dense in channels_last"),
        (torch.randn(2, 6, 4), r"expected x of 4 dimensions \(N, C, H, W\), got shape \[2, 6, 4\]"),
        (channels_last(2, 6, 4, 4).double(), "expected x of float32, bfloat16 or float16"),
        (torch.randn(0, 6, 4, 4), "expected x to hold values"),
    ],
    ids=["nchw", "3d", "float64", "empty"],
)
def test_the_bare_operator_refuses_bad_input(x, message):
    vectors = [torch.ones(6)] * 4
    with pytest.raises(ValueError, match=message):
        torch.ops.fastresnet.bn_relu.default(x, *vectors, 1e-5, True)


def test_the_bare_operator_refuses_a_foreign_mask():
    x = channels_last(2, 6, 4, 4)
    one = torch.ones(6)
    with pytest.raises(ValueError, match="expected the mask that the forward returned"):
        torch.ops.fastresnet.bn_add_relu_backward.default(
            x, torch.zeros(2, 4, 4, 6, dtype=torch.uint8), x, one, one, one, 1e-5, True
        )


def test_double_backward_is_refused():
    x = channels_last(2, 6, 4, 4).requires_grad_()
    out = ops.bn_relu(x, torch.zeros(6), torch.ones(6), None, None, training=False)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()


def test_mask_bits_follow_the_documented_layout():
    x = channels_last(2, 11, 3, 2)
    residual = channels_last(2, 11, 3, 2)
    zero, one = torch.zeros(11), torch.ones(11)
    out, mask = torch.ops.fastresnet.bn_add_relu.default(
        x, zero, one, one, zero, residual, 1e-5, False
    )
    assert mask.shape == (2, 3, 2, 2)
    bits = (mask.unsqueeze(-1) >> torch.arange(8)) & 1
    bits = bits.flatten(-2).bool()
    assert torch.equal(bits[..., :11], out.permute(0, 2, 3, 1) > 0)
    assert not bits[..., 11:].any()
