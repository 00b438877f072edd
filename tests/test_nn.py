# SPDX-License-Identifier: Apache-2.0
"""Torch's batch-norm modules through the fused operators: statistics, layouts, hooks, fallbacks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ERROR_RATIO
from torch import nn
from torchvision.models import resnet

from fastresnet import ops
from fastresnet.nn import BasicBlock, BatchNormAct2d, Bottleneck, FusedSequential
from fastresnet.nn.batch_norm import PendingBatchNorm, fused_call, materialize

# Mean, variance and the parameters' gradients are float32 vectors whatever x's dtype: one unit in
# the last place of float32, relative to the whole result, is what rounding them once or twice
# costs. At small sizes torch's error is now and then below it by luck.
FLOOR = torch.finfo(torch.float32).eps
CHANNELS_LAST = torch.channels_last


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_as_close(ours, torchs, oracle, what: str) -> None:
    """``ours`` is no further from the float64 ``oracle`` than ERROR_RATIO times ``torchs``."""
    error, bar = rms(ours.double() - oracle), rms(torchs.double() - oracle)
    assert error <= ERROR_RATIO * bar + FLOOR * rms(oracle), (what, error, bar)


def randomized(bn: nn.BatchNorm2d) -> nn.BatchNorm2d:
    with torch.no_grad():
        for tensor, low, high in (
            (bn.weight, -1.5, 1.5),
            (bn.bias, -1.0, 1.0),
            (bn.running_mean, -1.0, 1.0),
            (bn.running_var, 0.5, 2.0),
        ):
            if tensor is not None:
                tensor.uniform_(low, high)
    return bn


def run(module, x, grad):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    out.backward(grad.to(out.dtype))
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


BATCH_NORMS = {
    "default": {},
    "momentum": {"momentum": 0.3},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "not_affine": {"affine": False},
    "large_eps": {"eps": 0.1},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arguments", BATCH_NORMS.values(), ids=BATCH_NORMS.keys())
def test_batch_norm_semantics(arguments, training):
    stock = nn.Sequential(randomized(nn.BatchNorm2d(12, **arguments)), nn.ReLU()).train(training)
    oracle = copy.deepcopy(stock).double()
    ours = FusedSequential(*copy.deepcopy(stock))
    for _ in range(3):
        x = torch.randn(3, 12, 5, 7).contiguous(memory_format=CHANNELS_LAST) * 2 + 1
        grad = torch.randn(3, 12, 5, 7)
        assert isinstance(fused_call(copy.deepcopy(ours[0]), x), PendingBatchNorm)
        results = [
            run(m, x.to(d), grad)
            for m, d in ((ours, x.dtype), (stock, x.dtype), (oracle, torch.float64))
        ]
        for i, (a, b, c) in enumerate(zip(*results, strict=True)):
            assert_as_close(a, b, c, f"result {i}")
    for (name, a), b, c in zip(
        ours.named_buffers(), stock.buffers(), oracle.buffers(), strict=True
    ):
        if a.is_floating_point():
            assert_as_close(a, b, c, name)
        else:
            assert torch.equal(a, b), name
    assert ours.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_running_buffers_of_another_dtype(dtype):
    bn = nn.BatchNorm2d(8)
    ours = copy.deepcopy(bn)
    ours.running_mean, ours.running_var = ours.running_mean.to(dtype), ours.running_var.to(dtype)
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=CHANNELS_LAST) + 3
    bn(x)
    materialize(fused_call(ours, x))
    assert ours.running_mean.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(ours.running_mean.float(), bn.running_mean, rtol=eps, atol=eps)
    torch.testing.assert_close(ours.running_var.float(), bn.running_var, rtol=eps, atol=eps)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["channels_last", "nchw", "sliced"]),
    tail=st.sampled_from(["none", "relu", "identity"]),
    training=st.booleans(),
    frozen_parameters=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_sequential_against_float64(shape, dtype, layout, tail, training, frozen_parameters, seed):
    if training and shape[0] * shape[2] * shape[3] == 1:
        return  # refused by torch; see test_one_value_per_channel
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=dtype)
    if layout == "sliced":
        x = torch.randn(*shape[:3], 2 * shape[3], dtype=dtype)[..., ::2]
    if layout == "channels_last":
        x = x.contiguous(memory_format=CHANNELS_LAST)
    tails = {"none": [], "relu": [nn.ReLU(inplace=True)], "identity": [nn.Identity(), nn.ReLU()]}
    stock = nn.Sequential(randomized(nn.BatchNorm2d(shape[1])), *tails[tail]).train(training)
    stock.requires_grad_(not frozen_parameters)
    ours, oracle = FusedSequential(*copy.deepcopy(stock)), copy.deepcopy(stock).double()
    grad = torch.randn(shape)
    # The gate compares the same function: where rounding moved a value across the ReLU's kink,
    # the gradient differs from the oracle's by the whole gradient, in torch's result as in ours.
    out = oracle(x.double().clone()).detach()
    oracle.load_state_dict(stock.state_dict())
    grad = grad * ((out == 0) | (out > 0.05))
    if tail != "none":
        grad = grad * (copy.deepcopy(oracle)[0](x.double()).detach().abs() > 0.05)
    results = [
        run(m, x.to(d), grad.to(dtype))
        for m, d in ((ours, dtype), (stock, dtype), (oracle, torch.float64))
    ]
    assert results[0][0].dtype == dtype
    for i, (a, b, c) in enumerate(zip(*results, strict=True)):
        if c is None:
            assert a is None
            assert b is None
            continue
        # With few values a channel dx is a difference that cancels, at worst to nothing.
        scale = FLOOR * (rms(grad) + rms(c)) * 4
        error, bar = rms(a.double() - c), rms(b.double() - c)
        assert error <= ERROR_RATIO * bar + scale, (i, error, bar)


def make_block(kind, downsample, seed=0):
    torch.manual_seed(seed)
    expansion = kind.expansion
    planes = 8 if downsample else 16 // expansion
    branch = (
        nn.Sequential(
            nn.Conv2d(16, planes * expansion, 1, 2, bias=False), nn.BatchNorm2d(planes * expansion)
        )
        if downsample
        else None
    )
    arguments = {} if expansion == 1 else {"base_width": 64}
    return kind(16, planes, 2 if downsample else 1, branch, **arguments)


BLOCKS = [(resnet.BasicBlock, BasicBlock), (resnet.Bottleneck, Bottleneck)]


@pytest.mark.parametrize("downsample", [False, True], ids=["identity", "downsample"])
@pytest.mark.parametrize(("stock_type", "our_type"), BLOCKS, ids=["basic", "bottleneck"])
def test_hooks_fire_as_in_torchvision(stock_type, our_type, downsample):
    names = [name for name, _ in make_block(stock_type, downsample).named_modules() if name]
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=CHANNELS_LAST)
    for hooked in [[name] for name in names] + [names]:
        seen = []
        for kind in (stock_type, our_type):
            calls = []

            def record(kind_of_hook, name, values, calls=calls):
                tensors = [v.detach().clone() for v in values if isinstance(v, torch.Tensor)]
                calls.append((kind_of_hook, name, tensors))

            block = make_block(kind, downsample)
            for name in hooked:
                module = block.get_submodule(name)
                module.register_forward_pre_hook(
                    lambda m, args, name=name, record=record: record("pre", name, args)
                )
                module.register_forward_hook(
                    lambda m, args, out, name=name, record=record: record("out", name, (out,))
                )
                if not name.startswith(("bn", "relu")):  # an in-place ReLU forbids those
                    module.register_full_backward_hook(
                        lambda m, gin, gout, name=name, record=record: record("grad", name, gin)
                    )
            block(x.clone().requires_grad_()).square().sum().backward()
            seen.append(calls)
        assert [call[:2] for call in seen[0]] == [call[:2] for call in seen[1]], hooked
        for (kind_of_hook, name, expected), (_, _, got) in zip(*seen, strict=True):
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=f"{kind_of_hook} {name}")


def test_a_hook_may_replace_the_output():
    net = FusedSequential(nn.BatchNorm2d(4), nn.ReLU())
    net[0].register_forward_hook(lambda module, args, out: torch.full_like(out, -1))
    assert net(torch.randn(2, 4, 3, 3)).eq(0).all()


def test_global_hooks_are_seen():
    net, seen = FusedSequential(nn.BatchNorm2d(4), nn.ReLU()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(type(m)))
    try:
        net(torch.randn(2, 4, 3, 3))
    finally:
        handle.remove()
    assert seen == [nn.BatchNorm2d, nn.ReLU, FusedSequential]


def test_frozen_batch_norm_in_a_training_block():
    stock, ours = (make_block(kind, True).train() for kind in (resnet.BasicBlock, BasicBlock))
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=CHANNELS_LAST)
    for block in (stock, ours):  # one branch's statistics frozen, the other's not: no dual form
        block.bn2.eval()
        block.bn1.requires_grad_(False)
        for _ in range(2):
            block(x).sum().backward()
    for (name, a), b in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, nn.SyncBatchNorm, lambda c: nn.GroupNorm(2, c), nn.InstanceNorm2d]
)
def test_other_norm_layers_run_as_they_are(norm):
    torch.manual_seed(0)
    stock = resnet.BasicBlock(8, 8, norm_layer=norm).eval()
    ours = BasicBlock(8, 8, norm_layer=norm).eval()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(ours(x), stock(x))


def test_float64_is_torch_exactly():
    stock, ours = (make_block(kind, True).double() for kind in (resnet.Bottleneck, Bottleneck))
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    assert torch.equal(ours(x), stock(x))


def test_one_value_per_channel():
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        FusedSequential(nn.BatchNorm2d(4), nn.ReLU())(x)


def test_empty_batch_and_wrong_inputs_are_torchs():
    net = FusedSequential(nn.BatchNorm2d(4), nn.ReLU())
    assert net(torch.randn(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    with pytest.raises(ValueError, match="expected 4D input"):
        net(torch.randn(2, 4, 3))
    with pytest.raises(RuntimeError, match="running_mean should contain 3 elements not 4"):
        net(torch.randn(2, 3, 3, 3))
    assert net[0].num_batches_tracked <= 2


def test_nan_spreads_as_in_torch():
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    x[0, 1, 0, 0] = float("nan")
    stock = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    ours = FusedSequential(*copy.deepcopy(stock))
    assert torch.equal(ours(x).isnan(), stock(x).isnan())


def test_sequential_keeps_its_ways():
    net = FusedSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    assert isinstance(net[1:], FusedSequential)
    assert type(net[1]) is nn.BatchNorm2d
    assert net[1:][0] is net[1]
    assert list(net.state_dict()) == list(nn.Sequential(*net).state_dict())


def test_batch_norm_act():
    module, bn = BatchNormAct2d(6), nn.BatchNorm2d(6)
    assert module.state_dict().keys() == bn.state_dict().keys()
    for x in (torch.randn(3, 6, 5, 5), torch.randn(3, 6, 5, 5, dtype=torch.float64)):
        module, bn, residual = module.to(x.dtype), bn.to(x.dtype), torch.randn_like(x)
        torch.testing.assert_close(module(x), F.relu(bn(x)))
        torch.testing.assert_close(module(x, residual), F.relu(bn(x) + residual))
    torch.testing.assert_close(module.running_var, bn.running_var)


def test_mixed_dtype_residual_is_added_as_torch_does():
    """Under autocast a block's float32 input meets a bfloat16 branch."""
    stock, ours = (make_block(kind, False).eval() for kind in (resnet.BasicBlock, BasicBlock))
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=CHANNELS_LAST)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = ours(x), stock(x)
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("transform", ["jit_trace", "vmap", "jvp", "fx"])
def test_transforms_without_a_rule_see_torchs_modules(transform):
    stock = make_block(resnet.BasicBlock, True).eval()
    ours = make_block(BasicBlock, True).eval()
    x = torch.randn(2, 16, 6, 6)
    results = []
    for block in (stock, ours):
        if transform == "jit_trace":
            results.append(torch.jit.trace(block, x)(x))
        elif transform == "vmap":
            results.append(torch.func.vmap(block)(x[None]))
        elif transform == "jvp":
            results.append(torch.func.jvp(block, (x,), (x,))[1])
        else:
            results.append(torch.fx.symbolic_trace(block)(x))
    torch.testing.assert_close(*results)
    if transform == "fx":
        graphs = [torch.fx.symbolic_trace(block).graph for block in (stock, ours)]
        assert [node.name for node in graphs[0].nodes] == [node.name for node in graphs[1].nodes]


def test_kernels_take_what_these_tests_feed():
    """Were the extension missing, the tests above would compare torch with torch."""
    assert ops.has_kernel(torch.randn(2, 4, 3, 3).contiguous(memory_format=CHANNELS_LAST))
