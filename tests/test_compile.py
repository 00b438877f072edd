# SPDX-License-Identifier: Apache-2.0
"""Networks under torch.compile: our convolutions are traced into its graphs, so that a compiled
network computes what it computes otherwise."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from layouts import channels_last
from own_convolutions import has_ours, needs_ours
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torchvision.models import resnet
from torchvision.models.vgg import make_layers

import fastresnet
from fastresnet import nn as fused
from fastresnet import ops


class Graphs:
    """A backend that runs the graphs as they come, and keeps what they call."""

    def __init__(self) -> None:
        self.count = 0
        self.calls: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
        self.backend = aot_autograd(
            fw_compiler=self._keeper("forward"), bw_compiler=self._keeper("backward")
        )

    def _keeper(self, name: str) -> Callable[[fx.GraphModule, Any], Callable]:
        def keep(graph: fx.GraphModule, _inputs: Any) -> Callable:
            self.count += name == "forward"
            nodes = (node for node in graph.graph.nodes if node.op == "call_function")
            self.calls[name].update(str(node.target).removesuffix(".default") for node in nodes)
            return make_boxed_func(graph.forward)

        return keep


traces_nodes = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 12),
    reason="torch.compile gets torch's convolutions before torch 2.12",
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small_resnet(
    block: type[nn.Module], network: type[nn.Module] = fastresnet.models.ResNet
) -> nn.Module:
    """Of two stages, three blocks."""
    model = network(block, [2, 1, 1, 1])
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    model.fc = nn.Linear(128 * block.expansion, 5)
    return model.to(memory_format=torch.channels_last)


def small_vgg() -> nn.Module:
    features = make_layers([16, "M", 32, 32, "M"], batch_norm=True)
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    return fastresnet.convert(model.to(memory_format=torch.channels_last))


def results(run: Callable, model: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    """The output, every gradient, and what the model remembers, of one step."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(x)
    out.float().square().sum().backward()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"output": out.detach(), **gradients, **buffers}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], autocast: bool) -> None:
    """Nothing but the average and the classifier may be computed otherwise."""
    tolerance = 1e-2 if autocast else 1e-5
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm()
        assert error <= tolerance * value.double().norm(), name
        assert not found[name].requires_grad, name


NETWORKS = {
    "basic": lambda: small_resnet(fused.BasicBlock),
    "bottleneck": lambda: small_resnet(fused.Bottleneck),
    "converted": lambda: fastresnet.convert(small_resnet(resnet.BasicBlock, resnet.ResNet)),
    "vgg": small_vgg,
}


@traces_nodes
@pytest.mark.parametrize(
    ("name", "training", "autocast"),
    [
        ("basic", True, True),
        ("bottleneck", True, False),
        ("bottleneck", False, True),
        ("converted", True, False),
        ("vgg", True, False),
    ],
)
def test_a_compiled_network_trains_as_otherwise(name: str, training: bool, autocast: bool) -> None:
    eager, graphs = NETWORKS[name]().train(training), Graphs()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True)
    for _ in range(2):
        x = channels_last(2, 3, 32, 32)
        expected = results(eager, eager, x, autocast)
        assert_close(results(compiled, model, x, autocast), expected, autocast)
    if has_ours:
        convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
        assert graphs.calls["forward"]["fastresnet.conv_stats"] == convolutions
        assert graphs.calls["backward"]["fastresnet.conv_bn_backward"] == convolutions
        every = graphs.calls["forward"] + graphs.calls["backward"]
        assert not [target for target in every if "convolution" in target or "batch_norm" in target]


@traces_nodes
def test_batches_of_any_size_share_a_graph() -> None:
    eager, graphs = small_resnet(fused.BasicBlock), Graphs()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = channels_last(batch, 3, 32, 32)
        expected = results(eager, eager, x, autocast=False)
        assert_close(results(compiled, model, x, autocast=False), expected, autocast=False)
    assert graphs.count == 1


@traces_nodes
@needs_ours
def test_it_computes_inputs_of_blocks_anew_as_otherwise() -> None:
    model, graphs = small_resnet(fused.BasicBlock), Graphs()
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True)
    compiled(channels_last(2, 3, 32, 32)).sum().backward()
    joins = {"fastresnet.bn_add_relu", "fastresnet.bn_add_bn_relu"}
    assert sum(graphs.calls["forward"][join] for join in joins) == 3
    # The second block's; the first one's is a max-pool's output.
    assert sum(graphs.calls["backward"][join] for join in joins) == 1


def test_the_images_may_have_a_gradient() -> None:
    eager = small_resnet(fused.BasicBlock)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = channels_last(2, 3, 32, 32)
    gradients = []
    for run in (eager, compiled):
        images = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
        run(images).square().sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_blocks_of_which_nothing_is_trained() -> None:
    eager = small_resnet(fused.BasicBlock)
    for part in (eager.conv1, eager.bn1, eager.layer1):
        part.requires_grad_(False)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = channels_last(2, 3, 32, 32)
    outputs = []
    for run in (eager, compiled):
        outputs.append(run(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4)


@traces_nodes
@pytest.mark.parametrize(
    ("name", "autocast"), [("bottleneck", True), ("converted", False), ("vgg", True)]
)
def test_a_compiled_network_infers_as_otherwise(name: str, autocast: bool) -> None:
    model, graphs = NETWORKS[name]().eval(), Graphs()
    x, weight = channels_last(2, 3, 32, 32), next(iter(model.parameters()))
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True)
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)
        weight.data.mul_(0.5)  # what no counter of versions tells
        model.eval()
    if has_ours:
        convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
        assert graphs.calls["forward"]["fastresnet.conv_relu"] == convolutions
        assert not [target for target in graphs.calls["forward"] if "convolution" in target]


@torch.no_grad()
def test_what_no_kernel_takes_is_its_twins_in_a_graph_too() -> None:
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    compiled = torch.compile(ops.conv_relu, backend="aot_eager", fullgraph=True)
    expected = ops.reference.conv_relu(x, weight, None, padding=1)
    torch.testing.assert_close(compiled(x, weight, None, padding=1), expected)


@pytest.mark.skipif(not has_ours, reason="there are none to be left out")
def test_an_exported_network_has_torchs_convolutions() -> None:
    model = small_resnet(fused.BasicBlock).eval()
    x = channels_last(2, 3, 32, 32)
    with torch.enable_grad():
        program = torch.export.export(model, (x,))
    targets = Counter(str(node.target) for node in program.graph.nodes)
    assert targets["aten.conv2d.default"] == 8
    assert not [target for target in targets if "autograd_function" in target]
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
