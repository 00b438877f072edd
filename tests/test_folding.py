# SPDX-License-Identifier: Apache-2.0
"""Batch norm folded into fused convolutions in inference: our own, and cuDNN's, whose two operators
of aten exist on CUDA only and are given their definition on the CPU here, by the dispatcher."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import channels_last
from own_convolutions import has_ours, needs_ours
from tolerances import assert_no_worse
from torch import Tensor, nn

import fastresnet
from fastresnet import ops
from fastresnet.nn import FusedSequential, stages
from fastresnet.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONV_RELU = sys.modules["fastresnet.ops.conv_relu"]  # the package has the function by that name


@pytest.fixture
def by_cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """aten's operators on the CPU, in place of ours; the list holds the calls."""
    seen: list[str] = []
    for module in (ops, CONV_RELU):
        monkeypatch.setattr(module, "has_conv_kernel", lambda *_, **__: False)

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


@pytest.fixture
def by_ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of our own operator with a ReLU."""
    if not has_ours:
        pytest.skip("no convolutions of our own here")
    seen: list[str] = []
    call = ops.ConvSequence.__call__

    def record(sequence: ops.ConvSequence, x: Tensor) -> Tensor:
        for step in sequence.steps:
            assert isinstance(step.weight, ops.PackedWeight)
            if step.relu:
                seen.append("relu" if step.residual is None else "add_relu")
        return call(sequence, x)

    monkeypatch.setattr(ops.ConvSequence, "__call__", record)
    return seen


@pytest.fixture(params=["by_cudnn", "by_ours"])
def calls(request: pytest.FixtureRequest) -> list[str]:
    return request.getfixturevalue(request.param)


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


def projection() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))


@pytest.fixture
def block() -> nn.Module:
    return used(fastresnet.nn.BasicBlock(64, 128, 2, projection()))


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
def test_cudnns_operator_is_its_twin(
    by_cudnn: list[str], n, side, channels, out_channels, kernel, stride, dilation, dtype, residual
) -> None:
    geometry = {"stride": stride, "padding": kernel // 2 * dilation, "dilation": dilation}
    x = channels_last(n, channels, side, side, dtype=dtype)
    weight = channels_last(out_channels, channels, kernel, kernel, dtype=dtype)
    bias = torch.randn(out_channels).to(dtype)
    shape = F.conv2d(x, weight, None, **geometry).shape
    other = channels_last(*shape, dtype=dtype) if residual else None
    by_cudnn.clear()
    with torch.no_grad():
        takes = ops.has_conv_relu_kernel(x, weight)
        ours = ops.conv_relu(x, weight, bias, other, **geometry)
    assert takes == (channels % (16 // x.itemsize) == out_channels % (16 // x.itemsize) == 0)
    assert len(by_cudnn) == takes
    torch.testing.assert_close(ours, reference.conv_relu(x, weight, bias, other, **geometry))


def test_cudnns_operator_takes_only_what_it_says(
    by_cudnn: list[str], monkeypatch: pytest.MonkeyPatch
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
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cudnn, "deterministic", True)
            assert not has(x, weight)
        torch.use_deterministic_algorithms(True)
        try:
            assert not has(x, weight)
        finally:
            torch.use_deterministic_algorithms(False)
        assert has(x, weight)


@needs_ours
@settings(max_examples=150)
@given(
    n=st.integers(1, 9),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    channels=st.integers(1, 70),
    out_channels=st.integers(1, 70),
    kernel=st.sampled_from([1, 3, 7]),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES[:2]),
    vectors=st.tuples(st.booleans(), st.booleans()),
    relu=st.booleans(),
    packed=st.booleans(),
)
def test_our_operator_is_no_worse_than_torchs(
    n, height, width, channels, out_channels, kernel, stride, dilation, dtype, vectors, relu, packed
) -> None:
    bias, residual = vectors
    geometry = {"stride": stride, "padding": kernel // 2 * dilation, "dilation": dilation}
    x = channels_last(n, channels, height, width, dtype=dtype)
    weight = channels_last(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    weight = weight.to(dtype).float()
    vector = torch.randn(out_channels).to(dtype).float() if bias else None
    shape = F.conv2d(x.double(), weight.double(), None, **geometry).shape
    other = channels_last(*shape, dtype=dtype) if residual else None
    with torch.no_grad():
        filters = ops.PackedWeight(weight) if packed else weight
        ours = ops.conv_relu(x, filters, vector, other, relu=relu, **geometry)
        torchs = reference.conv_relu(x, weight, vector, other, relu=relu, **geometry)
    doubles = (None if t is None else t.double() for t in (x, weight, vector, other))
    exact = reference.conv_relu(*doubles, relu=relu, **geometry)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_no_worse(ours, torchs, exact, "y", exact.abs().max().item())


@needs_ours
@pytest.mark.parametrize("groups", [4, 32, 64])
@pytest.mark.parametrize("pack", [ops.PackedWeight, lambda weight: weight], ids=["packed", "plain"])
@torch.no_grad()
def test_our_operator_takes_groups(pack, groups: int) -> None:
    x, weight = channels_last(2, 64, 9, 9), channels_last(64, 64 // groups, 3, 3)
    geometry = {"padding": 1, "groups": groups}
    assert ops.has_conv_relu_kernel(x, weight, groups=groups)
    ours = ops.conv_relu(x, pack(weight), None, x, **geometry)
    torchs = reference.conv_relu(x, weight, None, x, **geometry)
    exact = reference.conv_relu(x.double(), weight.double(), None, x.double(), **geometry)
    assert_no_worse(ours, torchs, exact, "y", exact.abs().max().item())


@needs_ours
@torch.no_grad()
def test_a_packed_weight_is_for_every_size_and_number_of_threads() -> None:
    packed = ops.PackedWeight(channels_last(64, 64, 3, 3) / 24)
    # By places, by tiles, by taps; the first has no use for eight of nine taps.
    cases = [(40, 1), (40, 2), (3, 14), (1, 7), (40, 2), (1, 31)]
    methods = set()
    before = torch.get_num_threads()
    try:
        for dtype, threads in itertools.product(DTYPES[:2], (2, 1)):
            torch.set_num_threads(threads)
            for n, side in cases:
                x = channels_last(n, 64, side, side, dtype=dtype)
                arguments = (x, packed.weight, 1, 1, 1, 1)
                methods.add(torch.ops.fastresnet.conv_method(*arguments, packed=True))
                found = ops.conv_relu(x, packed, None, x, padding=1)
                anew = ops.PackedWeight(packed.weight)
                assert torch.equal(found, ops.conv_relu(x, anew, None, x, padding=1))
    finally:
        torch.set_num_threads(before)
    assert len(methods) > 1
    made = [values.data_ptr() for values in packed._of_input.values()]
    assert len(set(made)) < len(made), "sizes share what they read alike"


@needs_ours
def test_what_is_packed_once_may_be_filtered_minimally_where_packing_would_cost_more() -> None:
    arguments = (channels_last(1, 512, 7, 7), torch.empty(512, 512, 3, 3), 1, 1, 1, 1)
    in_training = torch.ops.fastresnet.conv_method(*arguments)
    in_inference = torch.ops.fastresnet.conv_method(*arguments, packed=True)
    assert (in_training[0], in_inference[0]) == (1, 2)


@needs_ours
@torch.no_grad()
def test_our_operator_refuses_what_does_not_fit() -> None:
    conv_relu = torch.ops.fastresnet.conv_relu
    x, weight = channels_last(1, 8, 4, 4), torch.ones(16, 8, 1, 1)
    packed = torch.ops.fastresnet.conv_pack(x, weight, 1, 0, 1, 1)
    rest = (False, 1, 0, 1, 1)
    good = conv_relu(x, packed, [16, 8, 1, 1], None, None, *rest)
    for match, arguments in {
        r"packed weight of \d+ values, .* got 7": (x, packed[:7], [16, 8, 1, 1], None, None),
        "packed weight as conv_pack makes": (x, packed.double(), [16, 8, 1, 1], None, None),
        r"weight of weight_size, got \[16, 8": (x, weight, [16, 8, 3, 3], None, None),
        r"weight of shape .* got \[16, 8, 1\]": (x, weight[..., 0], [16, 8, 1], None, None),
        r"weight of shape \[out_channels, 8, .* got \[16, 4, 1, 1\]": (
            x,
            packed,
            [16, 4, 1, 1],
            None,
            None,
        ),
        r"weight of shape .* got \[16, 8\]": (x, packed, [16, 8], None, None),
        "bias of 16 values": (x, packed, [16, 8, 1, 1], torch.ones(8), None),
        "bias of float32": (x, packed, [16, 8, 1, 1], torch.ones(16).double(), None),
        "residual of x's shape": (x, packed, [16, 8, 1, 1], None, good[:, :8]),
        "residual of x's dtype": (x, packed, [16, 8, 1, 1], None, good.bfloat16()),
    }.items():
        with pytest.raises(ValueError, match=match):
            conv_relu(*arguments, *rest)


@needs_ours
@torch.no_grad()
def test_opcheck() -> None:
    x, weight = channels_last(2, 8, 6, 6), channels_last(16, 8, 3, 3)
    packed = torch.ops.fastresnet.conv_pack(x, weight, 2, 1, 1, 1)
    rest = ([16, 8, 3, 3], torch.ones(16), None, True, 2, 1, 1, 1)
    for values in (packed, weight):
        torch.library.opcheck(torch.ops.fastresnet.conv_relu.default, (x, values, *rest))


@torch.no_grad()
def test_cudnn_takes_packed_weights_and_any_stride(by_cudnn: list[str]) -> None:
    x, weight, scale = channels_last(2, 8, 11, 11), channels_last(8, 8, 3, 3), torch.rand(8) + 0.5
    packed = ops.PackedWeight(weight, scale)
    bias = torch.randn(8)
    found = ops.conv_relu(x, packed, bias, stride=5)
    expected = reference.conv_relu(x, packed.scaled(), bias, stride=5)
    torch.testing.assert_close(found, expected)
    assert by_cudnn == ["relu"]


def test_without_the_operators_nothing_is_folded(
    block: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ops, CONV_RELU):
        monkeypatch.setattr(module, "has_conv_kernel", lambda *_, **__: False)
    with torch.no_grad():
        assert not ops.has_conv_relu_kernel(channels_last(1, 8, 2, 2), channels_last(8, 8, 1, 1))
        assert block(channels_last(2, 64, 8, 8)).shape == (2, 128, 4, 4)


def test_a_convolution_without_an_engine_runs_as_two_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CONV_RELU, "has_conv_kernel", lambda *_, **__: False)
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
    request: pytest.FixtureRequest,
    calls: list[str],
    kind: str,
    dtype: torch.dtype,
    amp: torch.dtype | None,
) -> None:
    # Of several networks together: errors of one network's few logits are of one piece.
    exact, found, torchs = [], [], []
    for _ in range(4):
        ours = used(small_network(kind))
        theirs = fastresnet.revert(copy.deepcopy(ours))
        x = channels_last(4, 3, 40, 40)
        exact.append(predict(copy.deepcopy(theirs).double(), x.double()))
        if amp is None:
            ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
        calls.clear()
        found.append(predict(ours, x, amp))
        # cuDNN's do not take the three channels of images, and leave what goes with a pool.
        ours_too = "by_ours" in request.fixturenames
        counts = {
            "basic": ["relu"] * ours_too + ["relu", "add_relu"] * 5,
            "bottleneck": ["relu"] * ours_too + ["relu", "relu", "add_relu"] * 5,
            "vgg": ["relu"] * (4 if ours_too else 2),
        }
        assert calls == counts[kind]
        torchs.append(predict(theirs, x, amp))
        assert found[-1].dtype == torchs[-1].dtype
    expected = torch.stack(exact)
    scale = expected.abs().max().item()
    assert_no_worse(torch.stack(found), torch.stack(torchs), expected, "logits", scale)


def test_cudnn_leaves_grouped_blocks(by_cudnn: list[str]) -> None:
    model = used(fastresnet.nn.Bottleneck(64, 16, groups=4, base_width=64))
    twin = fastresnet.revert(copy.deepcopy(model))
    x = channels_last(1, 64, 8, 8)
    torch.testing.assert_close(predict(model, x), predict(twin, x), rtol=1e-4, atol=1e-4)
    assert by_cudnn == []


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

    def without_statistics() -> None:
        bn.running_mean = bn.running_var = None

    def plain_attribute() -> None:
        del conv.weight
        conv.weight = other.detach()

    def geometry(**sizes: int) -> None:
        for name, size in sizes.items():
            setattr(block.conv2, name, (size, size))

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
        "plain attribute": plain_attribute,
        "attribute in front": lambda: vars(conv).update(weight=other),
        "bias": lambda: setattr(conv, "bias", nn.Parameter(torch.randn(128))),
        "buffer": lambda: setattr(bn, "running_mean", torch.randn(128)),
        "no statistics": without_statistics,
        "training": bn.train,
        "dilation": lambda: geometry(padding=2, dilation=2),
        "padding mode": lambda: setattr(block.conv2, "padding_mode", "circular"),
        "relu": lambda: setattr(block, "relu", nn.Tanh()),
        "no convolution": lambda: setattr(block, "downsample", Repeated()),
        "projection": lambda: setattr(block, "downsample", used(projection())),
        "projection's bias": lambda: nn.init.ones_(block.downsample[1].bias),
        "hook": lambda: conv.register_forward_hook(lambda _module, _args, y: 2 * y),
        "hook in front": lambda: bn.register_forward_pre_hook(lambda _module, args: (args[0] + 1,)),
        "projection's hook": lambda: block.downsample.register_forward_hook(lambda *args: -args[2]),
        "forward": lambda: setattr(bn, "forward", torch.neg),
        "class": lambda: setattr(conv, "__class__", Doubled),
    }
    return changes[change]


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Repeated(nn.Module):
    """A shortcut without parameters, every channel twice."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2].repeat(1, 2, 1, 1)


CHANGES = ["parameter", "pointer", "transposed", "state", "fused step", "step", "data"]
CHANGES += ["statistics", "in place", "eps", "module", "plain attribute", "attribute in front"]
CHANGES += ["bias", "buffer", "no statistics", "training", "dilation", "padding mode"]
CHANGES += ["relu", "no convolution", "projection", "projection's bias", "hook", "hook in front"]
CHANGES += ["projection's hook", "forward", "class"]


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


def without_folding(model: nn.Module, x: Tensor) -> Tensor:
    with torch.profiler.profile() as profile:
        y = predict(model, x)
    assert "aten::rsqrt" not in {event.key for event in profile.key_averages()}, "folded anew"
    return y


def test_a_fold_is_for_every_size(calls: list[str], block: nn.Module) -> None:
    twin = fastresnet.revert(copy.deepcopy(block))
    predict(block, channels_last(2, 64, 6, 6))
    for shape in [(1, 64, 6, 6), (2, 64, 9, 5), (2, 64, 6, 6), (2, 64, 1, 1)]:
        x = channels_last(*shape)
        found = without_folding(block, x)
        torch.testing.assert_close(found, predict(twin, x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 10
    with pytest.raises(RuntimeError, match="to have 64 channels, but got 32"):
        predict(block, channels_last(2, 32, 6, 6))


@needs_ours
def test_a_network_is_one_call_until_something_in_it_changes() -> None:
    model = used(small_network("bottleneck"))
    x = channels_last(2, 3, 40, 40)
    predict(model, x)

    def sequences() -> int:
        with torch.profiler.profile() as profile:
            found = predict(model, x)
        twin = fastresnet.revert(copy.deepcopy(model))
        torch.testing.assert_close(found, predict(twin, x), rtol=1e-3, atol=1e-3)
        events = {event.key: event.count for event in profile.key_averages()}
        assert "aten::batch_norm" not in events
        return events["fastresnet::conv_relu_sequence"]

    assert sequences() == 2, "the stem and all blocks"
    blocks = 5
    handle = model.layer3[0].register_forward_hook(lambda _module, _args, y: None)
    sequences()
    assert sequences() == 1 + blocks
    handle.remove()
    assert sequences() == 2
    handle = model.layer2.register_forward_hook(lambda _module, _args, y: 2 * y)
    sequences()
    assert sequences() == 1 + blocks
    handle.remove()
    with torch.no_grad():
        model.layer4[0].conv3.weight.mul_(2)
    sequences()
    assert sequences() == 2


@needs_ours
def test_a_block_by_itself_and_in_a_network_are_both_kept() -> None:
    model = used(small_network("basic"))
    x, inside = channels_last(2, 3, 40, 40), channels_last(2, 64, 10, 10)
    predict(model, x)
    predict(model.layer1[0], inside)
    without_folding(model, x)
    without_folding(model.layer1[0], inside)
    model.layer1[0].conv2.weight.data.mul_(2)
    model.eval()
    twin = fastresnet.revert(copy.deepcopy(model))
    for part, other, images in ((model, twin, x), (model.layer1[0], twin.layer1[0], inside)):
        torch.testing.assert_close(predict(part, images), predict(other, images))


@needs_ours
def test_one_value_a_channel_is_folded() -> None:
    model = used(fastresnet.resnet18(num_classes=10))
    x = channels_last(1, 3, 32, 32)
    predict(model, x)
    with torch.profiler.profile() as profile:
        found = predict(model, x)
    assert "aten::convolution" not in {event.key for event in profile.key_averages()}
    twin = fastresnet.revert(copy.deepcopy(model))
    torch.testing.assert_close(found, predict(twin, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["eval", "gradients"])
def test_a_stem_notices_writes_past_its_versions(change: str) -> None:
    model = used(fastresnet.resnet18(num_classes=10))
    x = channels_last(2, 3, 40, 40)
    predict(model, x)
    model.conv1.weight.data.mul_(2)
    model.eval() if change == "eval" else model(x)
    twin = fastresnet.revert(copy.deepcopy(model))
    torch.testing.assert_close(predict(model, x), predict(twin, x), rtol=1e-4, atol=1e-4)


@needs_ours
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_pool_behind_a_folded_convolution_is_torchs(value: float) -> None:
    layers = [nn.Conv2d(3, 32, 7, 2, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    model = used(FusedSequential(*layers))
    x = channels_last(2, 3, 41, 37)
    torchs = predict(nn.Sequential(*model), x)
    with torch.profiler.profile() as profile:
        found = predict(model, x)
    assert "aten::max_pool2d" not in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(found, torchs, rtol=1e-4, atol=1e-4)
    x[1, 2, 3, 4] = value
    found, torchs = predict(model, x), predict(nn.Sequential(*model), x)
    assert torch.equal(found[:1].isfinite(), torchs[:1].isfinite())
    torch.testing.assert_close(found, torchs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_branches_that_do_not_meet_are_torchs(calls: list[str]) -> None:
    # Of even sizes they do.
    shortcut = nn.Sequential(nn.Conv2d(64, 128, 2, 2), nn.BatchNorm2d(128))
    block = used(fastresnet.nn.BasicBlock(64, 128, 2, shortcut))
    for side in (6, 7, 8, 7):
        x = channels_last(2, 64, side, side)
        if side == 7:
            with pytest.raises(RuntimeError, match="must match the size"):
                predict(block, x)
        else:
            assert predict(block, x).shape == (2, 128, side // 2, side // 2)
    assert calls == ["relu", "add_relu"] * 2


def test_a_projection_of_ours_forgets_by_itself(calls: list[str], block: nn.Module) -> None:
    block.downsample = FusedSequential(*block.downsample).eval()
    x = channels_last(2, 64, 6, 6)
    predict(block, x)
    block.downsample[0].weight.data.mul_(2)
    block.downsample.eval()
    twin = fastresnet.revert(copy.deepcopy(block))
    torch.testing.assert_close(predict(block, x), predict(twin, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_place", [True, False])
def test_other_strides_are_noticed(calls: list[str], block: nn.Module, in_place: bool) -> None:
    x = channels_last(2, 64, 6, 6)
    convolutions = block.conv1, block.downsample[0]
    for conv in convolutions:
        conv.stride = [2, 2]
    assert predict(block, x).shape == without_folding(block, x).shape == (2, 128, 3, 3)
    for conv in convolutions:
        if in_place:
            conv.stride[:] = [1, 1]
        else:
            conv.stride = (1, 1)
    twin = fastresnet.revert(copy.deepcopy(block))
    torch.testing.assert_close(predict(block, x), predict(twin, x), rtol=1e-4, atol=1e-4)
    assert calls == ["relu", "add_relu"] * 3


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
    before = len(fastresnet.nn.fold_store._entries)
    block = other = None
    gc.collect()
    assert len(fastresnet.nn.fold_store._entries) < before


def test_what_float16_cannot_hold_is_not_folded(by_cudnn: list[str], block: nn.Module) -> None:
    x = channels_last(2, 64, 6, 6, dtype=torch.float16)
    with torch.no_grad():
        block.bn1.running_var.zero_()
        block.conv1.weight.fill_(1e-3)
        block.conv1.weight[0, 0, 0, 0] = 1e3
    amp = torch.float16
    found = predict(block, x * 1e-2, amp)
    assert by_cudnn == []
    assert found.isfinite().all()
    predict(block, x.float(), None)
    assert by_cudnn == ["relu", "add_relu"]


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


def test_what_is_asked_for_later_is_noticed(calls: list[str], block: nn.Module) -> None:
    x = channels_last(2, 64, 6, 6)
    expected = predict(block, x)
    calls.clear()
    predict(block, x, torch.bfloat16)  # a float32 input, which torch rounds
    predict(block, x.contiguous())
    predict(block, x[:0])
    block(x)
    assert calls == []
    assert torch.equal(predict(block, x), expected)
    assert calls == ["relu", "add_relu"]


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_dtypes_of_a_block_that_differ_fit_under_autocast_only(
    calls: list[str], block: nn.Module, amp: torch.dtype | None
) -> None:
    x = channels_last(2, 64, 6, 6, dtype=torch.bfloat16)
    block.conv1.bfloat16()
    predict(block, x, torch.bfloat16)
    assert calls == ["relu", "add_relu"]
    if amp is None:
        # The words of torch's convolution, which is another where oneDNN has none in bfloat16.
        onednn = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        with pytest.raises(RuntimeError, match="same" if onednn else "expected scalar type"):
            predict(block, x)
    assert calls == ["relu", "add_relu"]


def test_meta_tensors_are_torchs(calls: list[str], block: nn.Module) -> None:
    x = channels_last(2, 64, 6, 6).to("meta")
    assert predict(block.to("meta"), x).shape == (2, 128, 3, 3)
    model = FusedSequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU()).eval()
    assert predict(model.to("meta"), x).is_meta
    assert calls == []


def test_determinism_asked_for_later_is_noticed(by_cudnn: list[str], block: nn.Module) -> None:
    x = channels_last(2, 64, 6, 6)
    predict(block, x)
    torch.use_deterministic_algorithms(True)
    try:
        predict(block, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert by_cudnn == ["relu", "add_relu"]


def test_a_larger_input_is_measured_by_every_weight(
    by_cudnn: list[str], block: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONV_RELU, "_MOST_VALUES", 2 * 8 * 8 * 128)
    predict(block, channels_last(1, 64, 8, 8))
    assert by_cudnn == ["relu", "add_relu"]
    predict(block, channels_last(2, 64, 8, 8))
    assert by_cudnn == ["relu", "add_relu"]


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
