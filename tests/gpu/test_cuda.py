# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU: what the emulator cannot show."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from tolerances import assert_no_worse
from torch import Tensor

import fastresnet
from fastresnet import _extension, ops
from fastresnet.ops import Geometry, Normalized, choice, conv_graph, reference

pytestmark = pytest.mark.needs_cuda
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["bn", "bn_relu", "bn_add_relu", "bn_add_bn_relu", "bn_relu_max_pool"]
SHAPES = [(8, 64, 28, 28), (2, 19, 7, 9), (3, 12, 5, 5), (32, 2048, 7, 7)]


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, device="cuda").to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def run(module, form: str, values: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of ``module.<form>``, training."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    arguments = [leaves["x"], *module.bn_stats(leaves["x"]), leaves["weight"], leaves["bias"]]
    keywords = {}
    if "add" in form:
        arguments.append(leaves["residual"])
    if form == "bn_add_bn_relu":
        residual = leaves["residual"]
        arguments += [*module.bn_stats(residual), leaves["weight2"], leaves["bias2"]]
    if form == "bn_relu_max_pool":
        keywords = {"kernel_size": 3, "stride": 2, "padding": 1}
    out = getattr(module, form)(*arguments, **keywords, training=True)
    used = [name for name in leaves if leaves[name].requires_grad]
    gradients = torch.autograd.grad(out, [leaves[n] for n in used], grad, allow_unused=True)
    results = {f"d{n}": g for n, g in zip(used, gradients, strict=True) if g is not None}
    return {"out": out.detach(), **results}


def sample(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict, Tensor]:
    channels = shape[1]
    vectors = {
        name: torch.rand(channels, device="cuda") + 0.5
        for name in ("weight", "bias", "weight2", "bias2")
    }
    values = {name: channels_last(*shape, dtype=dtype) for name in ("x", "residual")} | vectors
    pooled = [(side - 1) // 2 + 1 for side in shape[2:]] if "pool" in form else shape[2:]
    return values, channels_last(*shape[:2], *pooled, dtype=dtype)


def test_the_library_is_loaded() -> None:
    assert _extension.is_active("cuda"), _extension.cuda_missing


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_operators_against_float64(form: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values, grad = sample(form, shape, dtype)
    exact = run(reference, form, {n: v.double() for n, v in values.items()}, grad.double())
    torchs, ours = run(reference, form, values, grad), run(ops, form, values, grad)
    rows = grad.numel() / shape[1]
    for name, value in exact.items():
        scale = rows if name not in ("out", "dx", "dresidual") else value.abs().max().item()
        assert_no_worse(ours[name], torchs[name], value, name, scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_average_pool_against_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, grad = channels_last(*shape, dtype=dtype), channels_last(*shape[:2], 1, 1, dtype=dtype)

    def run(module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        out = module.global_avg_pool(leaf)
        return out.detach(), *torch.autograd.grad(out, leaf, grad)

    exact = run(reference, x.double(), grad.double())
    torchs, ours = run(reference, x, grad), run(ops, x, grad)
    for name, *values in zip(("out", "dx"), ours, torchs, exact, strict=True):
        assert_no_worse(*values, name, values[-1].abs().max().item())
    assert ours[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_every_time_and_on_another_stream(form: str) -> None:
    values, grad = sample(form, (16, 64, 56, 56), torch.bfloat16)
    first = run(ops, form, values, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = run(ops, form, values, grad)
    torch.cuda.current_stream().wait_stream(stream)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


GRAPHS = {  # x, weight, stride
    "layer1, 1x1": ((32, 64, 56, 56), (256, 64, 1, 1), 1),
    "layer1, 3x3": ((32, 64, 56, 56), (64, 64, 3, 3), 1),
    "layer4, 1x1": ((32, 2048, 7, 7), (512, 2048, 1, 1), 1),
    "layer2, strided": ((32, 128, 56, 56), (128, 128, 3, 3), 2),
}


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_read", False)
    monkeypatch.setattr(choice, "policy", "timed")


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("case", GRAPHS)
@pytest.mark.parametrize("dtype", choice.DTYPES, ids=str)
def test_graphs_come_to_what_their_parts_do(dtype: torch.dtype, case: str) -> None:
    """Each is tried at first use, its result compared; only gradients of strided convolutions with
    a ReLU or a join in front have no plan."""
    x_size, weight_size, stride = GRAPHS[case]
    geometry = Geometry(stride, weight_size[2] // 2)
    x, addend = (channels_last(*x_size, dtype=dtype) for _ in range(2))
    weight = channels_last(*weight_size, dtype=dtype)
    y, mean, var = conv_graph.conv_stats(x, weight, geometry)
    grad = channels_last(*y.shape, dtype=dtype)
    vectors = [torch.rand(x_size[1], device="cuda") + 0.5 for _ in range(2)]
    norm = Normalized(x, *ops.bn_stats(x), *vectors, 1e-5, True)
    other = Normalized(addend, *ops.bn_stats(addend), *vectors, 1e-5, True)
    n, c, h, w = x_size
    mask = torch.randint(0, 256, (n, h, w, c // 8), dtype=torch.uint8, device="cuda")
    conv_graph.dgrad_add(grad, weight, addend, geometry)
    conv_graph.dgrad_bn_relu(grad, weight, norm, geometry)
    conv_graph.dgrad_join(grad, weight, addend, mask, norm, None, geometry)
    conv_graph.dgrad_join(grad, weight, addend, mask, norm, other, geometry)
    (found,) = choice.choices().values()
    assert len(found) == 5
    for problem, chosen in found.items():
        if stride > 1 and problem.startswith(("dgrad_bn_relu", "dgrad_join")):
            assert "no plan" in chosen.reason, (problem, chosen)
        else:
            assert chosen.reason.endswith("apart"), (problem, chosen)  # both were timed
    torch.testing.assert_close(
        var.double(), y.double().var((0, 2, 3), correction=0), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(mean.double(), y.double().mean((0, 2, 3)), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("policy", ["always", "never"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_training_step_with_graphs_and_without(
    monkeypatch: pytest.MonkeyPatch, name: str, policy: str
) -> None:
    monkeypatch.setattr(choice, "policy", policy)
    test_a_training_step_is_torchvisions(name, torch.bfloat16)
    fused = [chosen.fused for (under, _, _), chosen in choice._choices.items() if under == "always"]
    assert any(fused) == (policy == "always")


def step(model: torch.nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = model(x)
    out.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_training_step_is_torchvisions(name: str, dtype: torch.dtype) -> None:
    ours = getattr(fastresnet.models, name)(num_classes=10).cuda()
    theirs = getattr(torchvision.models, name)(num_classes=10).cuda()
    theirs.load_state_dict(ours.state_dict())
    exact = getattr(torchvision.models, name)(num_classes=10).cuda().double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(16, 3, 64, 64, device="cuda")
    wanted = step(exact, x.double(), torch.float32)
    found, torchs = step(ours, x, dtype), step(theirs, x, dtype)
    for key, value in wanted.items():
        assert_no_worse(found[key], torchs[key], value, key, value.abs().max().item())


def test_a_step_can_be_captured_in_a_graph() -> None:
    model = fastresnet.models.resnet18(num_classes=10).cuda()
    x = torch.randn(8, 3, 64, 64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, x, torch.bfloat16)
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.autocast("cuda", torch.bfloat16):
        model(x).float().square().mean().backward()
    graph.replay()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def used(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` in evaluation mode, as after some training."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.2, 0.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval().cuda()


def predict(model: torch.nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    enabled = dtype in DTYPES[1:]
    with torch.no_grad(), torch.autocast("cuda", dtype if enabled else None, enabled=enabled):
        return model(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn"])
def test_inference_is_torchvisions(name: str, dtype: torch.dtype) -> None:
    ours = used(getattr(fastresnet.models, name)(num_classes=10))
    theirs = fastresnet.revert(copy.deepcopy(ours))
    x = torch.randn(16, 3, 96, 96, device="cuda")
    exact = predict(copy.deepcopy(theirs).double(), x.double(), torch.float64)
    with torch.profiler.profile() as profile:
        found = predict(ours, x, dtype)
    calls = {event.key: event.count for event in profile.key_averages()}
    joins = {"resnet18": 8, "resnet50": 16}.get(name, 0)
    assert calls.get("aten::cudnn_convolution_add_relu", 0) == joins
    assert ("aten::cudnn_convolution_relu" in calls) == (name != "resnext50_32x4d")
    torchs = predict(theirs, x, dtype)
    assert_no_worse(found, torchs, exact, "logits", exact.abs().max().item())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_another = predict(ours, x, dtype)
    torch.cuda.current_stream().wait_stream(stream)
    assert_no_worse(on_another, torchs, exact, "logits", exact.abs().max().item())


def test_a_captured_inference_sees_new_weights() -> None:
    model = used(fastresnet.models.resnet18(num_classes=10))
    x = torch.randn(4, 3, 64, 64, device="cuda")
    predict(model, x, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = predict(model, x, torch.bfloat16)
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(2)
    model.train().eval()  # drops what was folded; the graph must not depend on it
    torch.cuda.empty_cache()
    graph.replay()
    expected = predict(model, x, torch.bfloat16)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
