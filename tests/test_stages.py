# SPDX-License-Identifier: Apache-2.0
"""Blocks chained: as one node each, and with joins whose output is handed out twice."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from layouts import channels_last
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastresnet
from fastresnet import ops
from fastresnet.nn import stages
from fastresnet.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def call(module, dual: bool, leaves: list[Tensor]):
    x, weight, bias, residual, residual_weight, residual_bias = leaves
    own = (*ops.bn_stats(x), weight, bias)
    if not dual:
        return module.bn_add_relu_fork(x, *own, residual, training=True)
    other = (*ops.bn_stats(residual), residual_weight, residual_bias)
    return module.bn_add_bn_relu_fork(x, *own, residual, *other, training=True)


@pytest.mark.parametrize("uses", ["both", "x", "shortcut"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
def test_fork_is_a_join_whose_gradients_add_up(dual: bool, dtype: torch.dtype, uses: str) -> None:
    shape = (3, 20, 6, 5)
    values = [channels_last(*shape, dtype=dtype), torch.rand(20), torch.randn(20)] * 2
    grads = [torch.randint(-8, 8, shape).to(dtype) for _ in range(2)]  # sums that are exact
    results = []
    for module in (ops, reference):
        leaves = [value.clone(memory_format=torch.preserve_format) for value in values]
        leaves = [leaf.requires_grad_() for leaf in (leaves if dual else leaves[:4])]
        fork = call(module, dual, leaves + [None] * (6 - len(leaves)))
        assert torch.equal(fork.x, fork.shortcut)
        pairs = list(zip(fork, grads, strict=True))
        pairs = {"both": pairs, "x": pairs[:1], "shortcut": pairs[1:]}[uses]
        outputs, incoming = zip(*pairs, strict=True)
        results.append([fork.x.detach(), *torch.autograd.grad(outputs, leaves, incoming)])
    assert type(fork).__name__ == "Fork"
    loose = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for ours, torchs in zip(*results, strict=True):
        scale = torchs.abs().max().item()
        torch.testing.assert_close(ours, torchs, rtol=loose, atol=loose * scale)


def test_nobody_uses_the_output() -> None:
    x = channels_last(2, 8, 4, 4).requires_grad_()
    fork = ops.bn_add_relu_fork(x, *ops.bn_stats(x), None, None, x.detach(), training=True)
    (dx,) = torch.autograd.grad(fork.x.sum() * 0 + x.sum(), x)
    assert torch.equal(dx, torch.ones_like(x))


@pytest.mark.parametrize("name", ["bn_add_relu", "bn_add_bn_relu"])
def test_two_gradients_are_the_sum(name: str) -> None:
    x, residual, grad, other = (channels_last(2, 12, 5, 4) for _ in range(4))
    vectors = [torch.zeros(12), torch.ones(12), torch.rand(12)]
    mask = torch.randint(0, 256, (2, 5, 4, 2), dtype=torch.uint8)
    mask[..., 1] &= 15
    rest = [mask, x, *vectors, 1e-5]
    if name == "bn_add_bn_relu":
        rest = [mask, x, *vectors, residual, *vectors, 1e-5, 1e-5]
    operator = getattr(torch.ops.fastresnet, f"{name}_fork_backward").default
    single = getattr(torch.ops.fastresnet, f"{name}_backward").default
    for ours, expected in zip(
        operator(grad, other, *rest, True), single(grad + other, *rest, True), strict=True
    ):
        assert torch.equal(ours, expected)
    torch.library.opcheck(operator, (grad, other, *rest, True))


# CUDA's chain, on the CPU.


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a training step."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x)
    out.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients, **dict(model.named_buffers())}


@pytest.fixture
def chained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA's chain on the CPU; the list holds the blocks that were run in one. Segments, which take
    the place of most (tests/test_conv_graph.py), are left out."""
    monkeypatch.setitem(stages._CHAINS, "cpu", stages._run_forks)
    monkeypatch.setattr(stages, "run_segments", lambda *_: None)
    monkeypatch.setattr("fastresnet.nn.blocks.residual_block", lambda *_: None)
    seen: list[str] = []
    for kind in (fastresnet.nn.BasicBlock, fastresnet.nn.Bottleneck):
        fork = kind.fork
        monkeypatch.setattr(
            kind,
            "fork",
            lambda self, x, fork=fork: seen.append(type(self).__name__) or fork(self, x),
        )
    return seen


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_chain_trains_as_block_by_block(
    chained: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = getattr(fastresnet.models, name)(num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 32, 32)
    ours = step(model, x)
    assert len(chained) == sum(len(getattr(model, f"layer{i}")) for i in range(1, 5))
    monkeypatch.delitem(stages._CHAINS, "cpu")
    expected = step(twin, x)
    assert len(chained) == 8 if name == "resnet18" else 16
    for key, value in expected.items():
        scale = value.abs().max().item() if value.numel() else 0
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4 * scale, msg=key)


def test_chain_saves_the_sum_of_gradients(chained: list[str]) -> None:
    """Between the joins of a chain autograd has nothing to accumulate."""
    model = fastresnet.models.resnet18(num_classes=5)
    loss = model(torch.randn(2, 3, 32, 32)).sum()
    uses: dict[object, int] = {}
    nodes, known = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        for parent, index in node.next_functions:
            if parent is None:
                continue
            uses[parent, index] = uses.get((parent, index), 0) + 1
            if parent not in known:
                known.add(parent)
                nodes.append(parent)
    twice = [parent.name() for (parent, _), count in uses.items() if count > 1]
    assert [name for name in twice if "Fork" in name or "add_relu" in name] == []
    forks = [parent for parent, _ in uses if "Fork" in parent.name()]
    assert len(forks) >= 8


@pytest.mark.parametrize("where", ["layer2", "layer2.0", "layer2.0.conv1", "layer2.0.downsample.0"])
def test_hooks_see_what_they_would_see(chained: list[str], where: str) -> None:
    model = fastresnet.models.resnet18(num_classes=5)
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[0].register_hook(seen.append)

    model.get_submodule(where).register_forward_hook(hook)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert chained == []
    assert len(seen) == 1


def test_without_gradients_or_on_other_devices_stages_run_one_by_one(
    chained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fastresnet.models.resnet18(num_classes=5)
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    monkeypatch.delitem(stages._CHAINS, "cpu")
    model(torch.randn(2, 3, 32, 32))
    assert chained == []


# The CPU's chain: of every other block's input, what it is made of is saved.


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What a training step saves for its backward, but for parameters."""
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in ours:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).sum()
    total = sum(sizes.values())
    loss.backward()
    return total


@pytest.mark.usefixtures("convolutions_at_every_level")
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet18"])
def test_inputs_computed_anew_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, frozen: bool
) -> None:
    model = getattr(fastresnet.models, name)(num_classes=5).train(not frozen)
    twin = copy.deepcopy(model)
    x = channels_last(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = step(model, x)
        monkeypatch.delitem(stages._CHAINS, "cpu")
        expected = step(twin, x)
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.usefixtures("convolutions_at_every_level")
def test_every_other_input_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastresnet.models.resnet50(num_classes=5).to(memory_format=torch.channels_last)
    x = channels_last(1, 3, 64, 64)
    chained = saved_bytes(model, x)
    monkeypatch.delitem(stages._CHAINS, "cpu")
    block_by_block = saved_bytes(model, x)
    # Of a stage's outputs the first and then every other, in stages of 3, 4, 6 and 3 blocks; the
    # last stage's third is no block's input.
    sizes = (256 * 16 * 16, 512 * 8 * 8, 1024 * 4 * 4, 2048 * 2 * 2)
    values = sum(count * size for count, size in zip((2, 2, 3, 1), sizes, strict=True))
    assert block_by_block - chained == 4 * values


@pytest.mark.usefixtures("convolutions_at_every_level")
def test_a_stem_without_a_pool_is_such_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastresnet.models.cifar_resnet18().to(memory_format=torch.channels_last)
    x = channels_last(2, 3, 32, 32)
    chained = saved_bytes(model, x)
    monkeypatch.delitem(stages._CHAINS, "cpu")
    block_by_block = saved_bytes(model, x)
    # The stem's, the first stage's second and the other stages' first output.
    sizes = (64 * 32 * 32, 64 * 32 * 32, 128 * 16 * 16, 256 * 8 * 8, 512 * 4 * 4)
    assert block_by_block - chained == 4 * 2 * sum(sizes)


@pytest.mark.usefixtures("convolutions_at_every_level")
@pytest.mark.parametrize("frozen", ["conv1 bn1", "conv1 bn1 layer1", "conv1 bn1 layer1 layer2.0"])
def test_what_a_frozen_part_does_not_save_is_not_saved_for_it(
    monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    model = fastresnet.models.cifar_resnet18().to(memory_format=torch.channels_last)
    for name in frozen.split():
        model.get_submodule(name).requires_grad_(False)
    x = channels_last(2, 3, 32, 32)
    chained = saved_bytes(model, x)
    monkeypatch.delitem(stages._CHAINS, "cpu")
    # The input of the first block that is trained is saved, of the inputs behind it every other.
    sizes = [128 * 16 * 16, 256 * 8 * 8, 512 * 4 * 4]
    if frozen == "conv1 bn1":
        sizes.append(64 * 32 * 32)
    assert saved_bytes(model, x) - chained == 4 * 2 * sum(sizes)


@pytest.mark.usefixtures("convolutions_at_every_level")
def test_a_chain_is_checkpointed_as_one() -> None:
    model = fastresnet.models.resnet18(num_classes=5).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    x = channels_last(2, 3, 64, 64)
    expected = step(twin, x)
    got = step(Checkpointed(model), x)
    for key, value in expected.items():
        if "running" not in key and "batches" not in key:  # a checkpoint's batch counts twice
            assert torch.equal(got[f"model.{key}" if key not in ("out", "x") else key], value), key


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.usefixtures("convolutions_at_every_level")
def test_a_block_that_is_no_node_interrupts_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastresnet.models.resnet18(num_classes=5).to(memory_format=torch.channels_last)
    model.layer2[0].relu = nn.LeakyReLU()
    twin = copy.deepcopy(model)
    x = channels_last(2, 3, 64, 64)
    ours = step(model, x)
    monkeypatch.delitem(stages._CHAINS, "cpu")
    expected = step(twin, x)
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("momentum", [0.1, None], ids=["exponential", "cumulative"])
def test_a_block_that_is_met_twice_remembers_both_batches(momentum: float | None) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet.BasicBlock(32, 32)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    ours = fastresnet.convert(copy.deepcopy(theirs))
    x = channels_last(2, 32, 8, 8)
    stages.run_stages([nn.Sequential(ours, ours)], x)
    theirs(theirs(x))
    wanted = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)
    assert ours.bn1.num_batches_tracked == 2
