# SPDX-License-Identifier: Apache-2.0
"""Batch norm folded into fused convolutions in inference. aten's two operators, which exist on CUDA
only, are given their definition on the CPU here, by way of the dispatcher."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_no_worse
from torch import Tensor, nn

import fastresnet
from fastresnet import ops
from fastresnet.nn import FusedSequential, stages
from fastresnet.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """aten's operators on the CPU; the list holds the calls."""
    seen: list[str] = []

    def convolution_relu(x, weight, bias, *geometry):
        assert x.dtype == weight.dtype == bias.dtype
        assert weight.is_contiguous(memory_format=torch.channels_last)
        seen.append("relu")
        return F.relu(F.conv2d(x, weight, bias, *geometry))

    def convolution_add_relu(x, weight, residual, alpha, bias, *geometry):
        assert x.dtype == weight.dtype == bias.dtype == residual.dtype
        seen.append("add_relu")
        return F.relu(F.conv2d(x, weight, bias, *geometry) + alpha * residual)

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_relu", convolution_relu, "CPU")
    library.impl("cudnn_convolution_add_relu", convolution_add_relu, "CPU")
    yield seen
    library._destroy()


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def used(model: nn.Module) -> nn.Module:
    """``model`` as after some training: no statistic, weight or bias is what it was at first."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, -0.5, 1.0)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.num_batches_tracked.fill_(7)
    return model.eval().to(memory_format=torch.channels_last)


@pytest.fixture
def block() -> nn.Module:
    projection = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    return used(fastresnet.nn.BasicBlock(64, 128, 2, projection))


def predict(model: nn.Module, x: Tensor, amp: torch.dtype | None = None) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", amp) if amp else nullcontext():
        return model(x)


# ---- The operator.


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 2),
    side=st.integers(1, 9),
    channels=st.integers(1, 20),
    out_channels=st.integers(1, 20),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
)
def test_operator_is_its_twin(
    calls: list[str], n, side, channels, out_channels, kernel, stride, dilation, dtype, residual
) -> None:
    geometry = {"stride": stride, "padding": kernel // 2 * dilation, "dilation": dilation}
    x = channels_last(n, channels, side, side, dtype=dtype)
    weight = channels_last(out_channels, channels, kernel, kernel, dtype=dtype)
    bias = torch.randn(out_channels).to(dtype)
    shape = F.conv2d(x, weight, None, **geometry).shape
    other = channels_last(*shape, dtype=dtype) if residual else None
    calls.clear()
    with torch.no_grad():
        takes = ops.has_conv_relu_kernel(x, weight)
        ours = ops.conv_relu(x, weight, bias, other, **geometry)
    assert takes == (channels % (16 // x.itemsize) == out_channels % (16 // x.itemsize) == 0)
    assert len(calls) == takes
    torch.testing.assert_close(ours, reference.conv_relu(x, weight, bias, other, **geometry))


def test_operator_takes_only_what_it_says(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = channels_last(2, 16, 5, 5), channels_last(16, 16, 3, 3)
    has = ops.has_conv_relu_kernel
    assert not has(x, weight), "gradients are recorded"
    with torch.no_grad():
        assert has(x, weight)
        assert has(x[:1, :, :1, :1], weight)
        assert not has(x, weight, groups=2)
        assert not has(x.double(), weight)
        assert not has(x.contiguous(), weight)
        assert not has(x[:0], weight)
        assert not has(x, weight.double())
        assert not has(x[0], weight)
        assert not has(x, weight[:1].expand(2**28, -1, -1, -1)), "2**31 values"
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        assert not has(x, weight)
        monkeypatch.undo()
        torch.use_deterministic_algorithms(True)
        try:
            assert not has(x, weight)
        finally:
            torch.use_deterministic_algorithms(False)
        assert has(x, weight)


def test_without_the_operators_nothing_is_folded(block: nn.Module) -> None:
    with torch.no_grad():
        assert not ops.has_conv_relu_kernel(channels_last(1, 8, 2, 2), channels_last(8, 8, 1, 1))
        assert block(channels_last(2, 64, 8, 8)).shape == (2, 128, 4, 4)


def test_a_convolution_without_an_engine_runs_as_two_and_says_so() -> None:
    asked: list[torch.Size] = []

    def refuse(x, *rest):
        asked.append(x.shape)
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    x, weight, bias = channels_last(3, 8, 6, 6), channels_last(8, 8, 1, 1), torch.randn(8)
    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_relu", refuse, "CPU")
    library.impl("cudnn_convolution_add_relu", fail, "CPU")
    try:
        with torch.no_grad():
            with pytest.warns(UserWarning, match=r"no engine .* \(3, 8, 6, 6\)"):
                first = ops.conv_relu(x, weight, bias)
            second = ops.conv_relu(x, weight, bias)
            with pytest.raises(RuntimeError, match="illegal memory access"):
                ops.conv_relu(x, weight, bias, x)
    finally:
        library._destroy()
    assert asked == [x.shape]
    expected = reference.conv_relu(x, weight, bias)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


# ---- Networks.


def small_network(kind: str) -> nn.Module:
    """A network of ours with ten outputs."""
    if kind == "vgg":  # with a max-pool behind the second triple, which the stem's kernel takes
        widths, layers = (3, 16, 16, 24, 24), []
        for width, out in itertools.pairwise(widths):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        layers.insert(6, nn.MaxPool2d(2))
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)]
        return FusedSequential(*layers, *head)
    block = {"basic": fastresnet.nn.BasicBlock, "bottleneck": fastresnet.nn.Bottleneck}[kind]
    return fastresnet.models.ResNet(block, [1, 2, 1, 1], num_classes=10)


@pytest.mark.parametrize(
    ("dtype", "amp"),
    [(torch.float32, None), *((d, a) for d in DTYPES[1:] for a in (None, d))],
    ids=str,
)
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "vgg"])
def test_networks_are_no_worse_than_torchs(
    calls: list[str], kind: str, dtype: torch.dtype, amp: torch.dtype | None
) -> None:
    # Of several networks together: errors of one network's few logits are of one piece.
    exact, found, torchs = [], [], []
    for _ in range(4):
        ours = used(small_network(kind))
        theirs = fastresnet.revert(copy.deepcopy(ours))
        x = torch.randn(4, 3, 40, 40)
        exact.append(predict(copy.deepcopy(theirs).double(), x.double()))
        if amp is None:
            ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
        calls.clear()
        found.append(predict(ours, x, amp))
        # Of a VGG's triples the first has odd channels, and the second goes with the pool.
        counts = {"basic": ["relu", "add_relu"] * 5, "bottleneck": ["relu", "relu", "add_relu"] * 5}
        assert calls == counts.get(kind, ["relu"] * 2)
        torchs.append(predict(theirs, x, amp))
        assert found[-1].dtype == torchs[-1].dtype
    expected = torch.stack(exact)
    scale = expected.abs().max().item()
    assert_no_worse(torch.stack(found), torch.stack(torchs), expected, "logits", scale)


def test_grouped_blocks_run_as_before(calls: list[str]) -> None:
    model = used(fastresnet.nn.Bottleneck(64, 16, groups=4, base_width=64))
    twin = fastresnet.revert(copy.deepcopy(model))
    x = channels_last(1, 64, 8, 8)
    torch.testing.assert_close(predict(model, x), predict(twin, x), rtol=1e-4, atol=1e-4)
    assert calls == []


def test_a_bias_of_every_convolution_counts(calls: list[str]) -> None:
    layers = [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    model = used(FusedSequential(*layers, nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    x = channels_last(2, 8, 6, 6)
    torch.testing.assert_close(predict(model, x), predict(nn.Sequential(*model), x))
    assert calls == ["relu", "relu"]
    projection = nn.Sequential(nn.Conv2d(64, 128, 1, 2), nn.BatchNorm2d(128))
    block = fastresnet.nn.BasicBlock(64, 128, 2, projection)
    block.conv2 = nn.Conv2d(128, 128, 3, padding=1)
    twin = fastresnet.revert(copy.deepcopy(used(block)))
    x = channels_last(2, 64, 6, 6)
    torch.testing.assert_close(predict(block, x), predict(twin, x), rtol=1e-4, atol=1e-5)


def changed(change: str, block: nn.Module) -> Callable[[], None]:
    """Something that changes what ``block`` computes in inference."""
    conv, bn = block.conv1, block.bn2
    with torch.no_grad():
        other = copy.deepcopy(conv.weight) * 2
    state = {key: value + 0.25 for key, value in block.state_dict().items()}

    def step(**options: object) -> None:
        optimizer = torch.optim.SGD(block.parameters(), lr=0.5, **options)
        for parameter in block.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    def through_data() -> None:
        conv.weight.data.mul_(2)
        block.eval()

    def by_training_elsewhere() -> None:
        bn.train()
        bn(channels_last(4, 128, 3, 3) + 5)
        bn.eval()

    def in_place() -> None:
        with torch.no_grad():
            block.downsample[1].running_mean.add_(1)

    changes: dict[str, Callable[[], object]] = {
        "parameter": lambda: setattr(conv, "weight", nn.Parameter(other)),
        "pointer": lambda: setattr(conv.weight, "data", other),
        "transposed": lambda: setattr(conv.weight, "data", conv.weight.data.transpose(2, 3)),
        "state": lambda: block.load_state_dict(state),
        "fused step": lambda: step(fused=True),
        "step": step,
        "data": through_data,
        "statistics": by_training_elsewhere,
        "in place": in_place,
        "eps": lambda: setattr(bn, "eps", 0.5),
        "module": lambda: setattr(block, "bn1", used(nn.BatchNorm2d(128))),
    }
    return changes[change]


CHANGES = ["parameter", "pointer", "transposed", "state", "fused step", "step", "data"]
CHANGES += ["statistics", "in place", "eps", "module"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_fold_is_kept_until_something_changes(
    calls: list[str], block: nn.Module, change: str
) -> None:
    x = channels_last(2, 64, 6, 6)
    change_it = changed(change, block)
    before = predict(block, x)
    with torch.profiler.profile() as profile:
        again = predict(block, x)
    assert "aten::rsqrt" not in {event.key for event in profile.key_averages()}, "folded anew"
    assert torch.equal(before, again)
    change_it()
    found = predict(block, x)
    twin = fastresnet.revert(copy.deepcopy(block))
    torch.testing.assert_close(found, predict(twin, x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)


def test_a_forward_with_gradients_and_to_drop_folds(
    calls: list[str], block: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A chain does not call its blocks.
    monkeypatch.setitem(stages._CHAINS, "cpu", stages._run_forks)
    x = channels_last(2, 64, 6, 6)
    chain = nn.Sequential(block)
    drops = (lambda: block(x), lambda: stages.run_stages([chain], x), block.float, block.train)
    for drop in drops:
        block.eval()
        predict(block, x)
        block.conv1.weight.data.mul_(2)
        drop()
        if drop == block.train:
            block.eval()
        twin = fastresnet.revert(copy.deepcopy(block))
        torch.testing.assert_close(predict(block, x), predict(twin, x), rtol=1e-4, atol=1e-4)


def test_weights_that_come_and_go_at_one_address(calls: list[str], block: nn.Module) -> None:
    """torch.func.functional_call with one set of weights after another."""
    x = channels_last(1, 64, 4, 4)
    twin = fastresnet.revert(copy.deepcopy(block))
    for index in range(6):
        state = {key: value * (1 + index) for key, value in twin.state_dict().items()}
        with torch.no_grad():
            ours = torch.func.functional_call(block, state, (x,))
            theirs = torch.func.functional_call(twin, state, (x,))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        del state
        gc.collect()
    assert len(calls) == 12


def test_inference_mode_and_its_tensors(calls: list[str], block: nn.Module) -> None:
    x = channels_last(2, 64, 6, 6)
    expected = predict(block, x)
    block.eval()
    with torch.inference_mode():
        first = block(x)
    assert torch.equal(predict(block, x), expected)
    assert torch.equal(first, expected)
    with torch.inference_mode():
        made = copy.deepcopy(block)
        assert torch.equal(made(x), expected)
        made.bn1.running_mean.add_(1)
        twin = fastresnet.revert(copy.deepcopy(made))
        torch.testing.assert_close(made(x), twin(x), rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_memory(calls: list[str], block: nn.Module) -> None:
    x = channels_last(2, 64, 6, 6)
    size = len(pickle.dumps(block))
    expected = predict(block, x)
    assert abs(len(pickle.dumps(block)) - size) < 100
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(predict(other, x), expected)
    before = len(fastresnet.nn.folding._folds)
    block = other = None
    gc.collect()
    assert len(fastresnet.nn.folding._folds) < before


def test_what_float16_cannot_hold_is_not_folded(calls: list[str], block: nn.Module) -> None:
    x = channels_last(2, 64, 6, 6, dtype=torch.float16)
    with torch.no_grad():
        block.bn1.running_var.zero_()
        block.conv1.weight.fill_(1e-3)
        block.conv1.weight[0, 0, 0, 0] = 1e3
    amp = torch.float16
    found = predict(block, x * 1e-2, amp)
    assert calls == []
    assert found.isfinite().all()
    predict(block, x.float(), None)
    assert calls == ["relu", "add_relu"]


@pytest.mark.parametrize("where", ["conv1", "bn1", "relu", "downsample", "downsample.0"])
def test_hooks_are_called(calls: list[str], block: nn.Module, where: str) -> None:
    seen: list[nn.Module] = []
    block.get_submodule(where).register_forward_hook(lambda module, *_: seen.append(module))
    predict(block, channels_last(2, 64, 6, 6))
    assert seen
    assert calls == []


def test_training_mode_and_gradients_are_not_folded(calls: list[str], block: nn.Module) -> None:
    x = channels_last(2, 64, 6, 6)
    block(x).sum().backward()
    block.bn1.train()
    predict(block, x)
    assert calls == []


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_a_float32_input_under_autocast_is_torchs(
    calls: list[str], block: nn.Module, amp: torch.dtype | None
) -> None:
    predict(block, channels_last(2, 64, 6, 6), amp)
    assert calls == ([] if amp else ["relu", "add_relu"])


@pytest.mark.filterwarnings("ignore:.*jit.trace:FutureWarning")
def test_compiled_and_exported_networks_see_no_folds(calls: list[str], block: nn.Module) -> None:
    x = channels_last(2, 64, 6, 6)
    expected = predict(block, x)
    calls.clear()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled, x), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        exported = torch.export.export(block, (x,)).module()
        traced = torch.jit.trace(block, x, check_trace=False)
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)
    assert calls == []
