# SPDX-License-Identifier: Apache-2.0
"""The networks are torchvision's in everything but speed: signatures, weights, numbers, tools."""

from __future__ import annotations

import collections
import copy
import inspect
import io
import pickle
import statistics
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tolerances import ERROR_RATIO
from torch import nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import fastresnet
from fastresnet import models, ops
from fastresnet.nn import BasicBlock, Bottleneck

RESNETS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
VGGS = ["vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"]

# Rounding the float32 statistics of the last layers: with a handful of values a channel torch's
# error is now and then below it by luck. Relative to each tensor's size.
FLOOR = 4 * torch.finfo(torch.float32).eps


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def pair(layers=(1, 1, 1, 1), blocks="basic", **options):
    """torchvision's network and ours with the same weights, shallow enough for a test."""
    stock_block, our_block = {
        "basic": (resnet.BasicBlock, BasicBlock),
        "bottleneck": (resnet.Bottleneck, Bottleneck),
    }[blocks]
    options = {"num_classes": 10, **options}
    torch.manual_seed(0)
    stock = resnet.ResNet(stock_block, list(layers), **options)
    torch.manual_seed(0)
    return stock, models.ResNet(our_block, list(layers), **options)


# Signatures, weights and initial values


@pytest.mark.parametrize("name", RESNETS + VGGS)
def test_builder_has_torchvisions_face(name):
    ours, stock = getattr(models, name), getattr(torchvision.models, name)
    assert inspect.signature(ours) == inspect.signature(stock)
    assert torchvision.models._api._get_enum_from_fn(ours) is (
        torchvision.models.get_model_weights(name)
    )
    assert pickle.loads(pickle.dumps(ours)) is ours
    with torch.device("meta"):
        model, original = ours(num_classes=7), stock(num_classes=7)
    assert isinstance(model, type(original))
    assert type(model) in (models.ResNet, models.VGG)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, original)]
    assert shapes[0] == shapes[1]
    names = [[name for name, _ in m.named_modules()] for m in (model, original)]
    assert names[0] == names[1]
    assert not any(type(m) in (resnet.BasicBlock, resnet.Bottleneck) for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_same_seed_same_network(name):
    networks = []
    for module in (models, torchvision.models):
        torch.manual_seed(3)
        networks.append(getattr(module, name)(num_classes=11))
    assert_same_state(*networks)
    nn.init.normal_(next(networks[0].parameters()))
    networks[1].load_state_dict(networks[0].state_dict(), strict=True)
    networks[0].load_state_dict(networks[1].state_dict(), strict=True)
    assert_same_state(*networks)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESNETS + VGGS)
def test_same_seed_same_network_everywhere(name):
    test_same_seed_same_network(name)


@pytest.mark.parametrize(
    "options",
    [
        {"zero_init_residual": True},
        {"replace_stride_with_dilation": [False, True, True]},
        {"groups": 4, "width_per_group": 8},
        {"width_per_group": 32},
        {"norm_layer": partial(nn.GroupNorm, 8)},
        {"norm_layer": torchvision.ops.FrozenBatchNorm2d},
        {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)},
        {"num_classes": 3},
    ],
    ids=str,
)
def test_keyword_arguments(options):
    stock, ours = pair(blocks="bottleneck", **options)
    assert_same_state(stock, ours)
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        torch.testing.assert_close(
            ours.train(training)(x), stock.train(training)(x), rtol=1e-3, atol=1e-4
        )


def test_wrong_keyword_arguments_are_refused_as_in_torchvision():
    for module in (models, torchvision.models):
        with pytest.raises(ValueError, match="BasicBlock only supports"):
            module.resnet18(groups=2)
        with pytest.raises(TypeError, match="unexpected keyword"):
            module.resnet18(depth=3)
        with pytest.raises(ValueError, match="replace_stride_with_dilation"):
            module.resnet18(replace_stride_with_dilation=[True])


def test_weights(monkeypatch):
    """Weights go through torchvision's enum: by member, by name, by the legacy ``pretrained``."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    assert weights is torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, *args, **kwargs: state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = [
            models.resnet18(weights=weights),
            models.resnet18(weights="IMAGENET1K_V1"),
            models.resnet18(pretrained=True),
        ]
    for model in built:
        assert type(model) is models.ResNet
        assert torch.equal(model.fc.weight, state["fc.weight"])
    with pytest.raises(ValueError, match="num_classes"):
        models.resnet18(weights=weights, num_classes=10)


# Numbers


def step(model, x, target, autocast=False):
    """Everything one training step computes: output, input's gradient, gradients, statistics."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(x)
    F.cross_entropy(out.to(torch.promote_types(out.dtype, torch.float32)), target).backward()
    values = {"output": out.detach(), "input.grad": x.grad}
    values |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return values | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def errors(values, oracle) -> dict[str, float]:
    """Relative error of the output, the gradients and the running statistics, each as the root
    mean square over its tensors."""
    squares = collections.defaultdict(list)
    for name, expected in oracle.items():
        kind = "gradients" if name.endswith("grad") else name
        kind = "statistics" if "running" in name else kind
        scale = expected.norm()
        if scale > 1e-9:  # the gradient of a bias before a batch norm is zero but for rounding
            squares[kind].append(((values[name].double() - expected).norm() / scale) ** 2)
    return {kind: torch.stack(v).mean().sqrt().item() for kind, v in squares.items()}


def assert_no_further_from_float64(stock, ours, inputs, *, autocast=False):
    """Compares a training step and an evaluation on each of ``inputs``; stock in both layouts.

    What is compared is the median over the inputs. Ten logits of one small batch are too few for
    a ratio of rounding errors to mean anything; and where rounding moves one value across a
    ReLU's kink, float32 gradients are off by 1e-2 instead of 1e-6, in torchvision's run or in
    ours, by luck.
    """
    oracle = copy.deepcopy(stock).double()
    stock_nhwc = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    found = collections.defaultdict(lambda: ([], [], []))
    for x in inputs:
        target = torch.randint(0, 10, (len(x),))
        nhwc = x.contiguous(memory_format=torch.channels_last)
        for phase in ("train", "eval"):
            for model in (stock, stock_nhwc, ours, oracle):
                model.train(phase == "train").zero_grad()
            expected = step(oracle, x.double(), target)
            runs = ((ours, x), (stock, x), (stock_nhwc, nhwc))
            for i, (model, images) in enumerate(runs):
                for kind, error in errors(step(model, images, target, autocast), expected).items():
                    found[phase, kind][i].append(error)
    for case, values in found.items():
        error, *bars = map(statistics.median, values)
        assert error <= ERROR_RATIO * max(bars) + FLOOR, (case, error, bars)


PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "autocast": (torch.float32, True),
}
# In float16 torch's convolutions take half a minute or more for a network.
QUICK_PRECISIONS = [precision for precision in PRECISIONS if precision != "float16"]


@pytest.mark.parametrize(
    ("blocks", "precision"),
    [
        pytest.param(
            *(blocks, precision),
            marks=[] if precision in QUICK_PRECISIONS else [pytest.mark.slow],
        )
        for blocks in ("basic", "bottleneck")
        for precision in PRECISIONS
    ],
)
def test_numbers(blocks, precision):
    dtype, autocast = PRECISIONS[precision]
    stock, ours = pair(blocks=blocks)
    inputs = torch.randn(5, 4, 3, 40, 40).to(dtype)
    assert_no_further_from_float64(stock.to(dtype), ours.to(dtype), inputs, autocast=autocast)


@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    blocks=st.sampled_from(["basic", "bottleneck"]),
    layers=st.lists(st.integers(1, 2), min_size=4, max_size=4),
    batch=st.integers(2, 4),
    height=st.integers(33, 48),
    width=st.integers(33, 48),
    precision=st.sampled_from(QUICK_PRECISIONS),
    channels_last=st.booleans(),
    zero_init_residual=st.booleans(),
    seed=st.integers(0, 100),
)
def test_numbers_of_random_networks(
    blocks, layers, batch, height, width, precision, channels_last, zero_init_residual, seed
):
    dtype, autocast = PRECISIONS[precision]
    stock, ours = pair(layers, blocks, zero_init_residual=zero_init_residual)
    torch.manual_seed(seed)
    inputs = torch.randn(5, batch, 3, height, width).to(dtype)
    if channels_last:
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    assert_no_further_from_float64(stock.to(dtype), ours.to(dtype), inputs, autocast=autocast)


def test_numbers_of_vgg():
    torch.manual_seed(0)
    features = torchvision.models.vgg.make_layers([16, "M", 32, 32, "M"], batch_norm=True)
    stock = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    ours = models.convert(copy.deepcopy(stock))
    assert_no_further_from_float64(stock, ours, torch.randn(5, 4, 3, 32, 32))


def test_checkpointing_gives_the_same_gradients():
    _, ours = pair()
    plain = copy.deepcopy(ours)
    x = torch.randn(2, 3, 64, 64)

    def features(model, x):
        return model.maxpool(model.relu(model.bn1(model.conv1(x))))

    for model, recompute in ((plain, False), (ours, True)):
        y = features(model, x)
        for layer in (model.layer1, model.layer2):
            y = checkpoint(layer, y, use_reentrant=False) if recompute else layer(y)
        y.square().mean().backward()
    for (name, a), b in zip(ours.layer1.named_parameters(), plain.layer1.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", ["conv1", "layer2.0.conv2", "layer2.0.downsample.0"])
def test_a_convolutions_sizes_may_be_numbers(name, training):
    """Torch takes ``conv.stride = 1``, as networks that keep the last maps large are made."""
    torch.manual_seed(0)
    stock, ours = pair()
    for model in (stock, ours):
        conv = model.train(training).get_submodule(name)
        for sizes in ("stride", "padding", "dilation"):
            setattr(conv, sizes, getattr(conv, sizes)[0])
    x = torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-3, atol=1e-4)


def test_frozen_parts():
    stock, ours = pair()
    for model in (stock, ours):
        model.layer1.requires_grad_(False).eval()
        model.bn1.requires_grad_(False)
        model(torch.ones(2, 3, 64, 64) * torch.arange(2).view(2, 1, 1, 1)).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
    for (name, a), b in zip(ours.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


# The kernels that were compiled are the ones that run


def resnet_ops(
    blocks: int, per_block: int, anew: tuple[int, int], pooled: bool = True
) -> dict[str, int]:
    """``blocks`` residual blocks of ``per_block`` batch norms, four stages. A basic first stage
    has no downsampling branch. anew: joins that the backward computes once more, without and with
    such a branch."""
    dual = 3 if per_block == 2 else 4
    joins = {"bn_add_relu": blocks - dual, "bn_add_bn_relu": dual}
    stem = "bn_relu_max_pool" if pooled and HAS_MAX_POOL else "bn_relu"
    average = {"global_avg_pool": 1, "global_avg_pool_backward": 1}
    if HAS_CONVOLUTIONS:
        convolutions = 1 + blocks * per_block + dual
        backward = {"conv_bn_backward": convolutions, "bn_sums": blocks, f"{stem}_backward": 1}
        joins = {op: joins[op] + more for op, more in zip(joins, anew, strict=True)}
        stems = 1 if pooled else 2  # the stem's output is one of those inputs too
        return {stem: stems, "conv_stats": convolutions, **joins, **backward, **average}
    inner = blocks * (per_block - 1)
    forward = collections.Counter({"bn_relu": inner, **joins}) + collections.Counter([stem])
    backward = {f"{op}_backward": count for op, count in forward.items()}
    return {"bn_stats": 1 + inner + blocks + dual, **forward, **backward, **average}


def vgg_ops(convolutions: int, stages: int) -> dict[str, int]:
    """Convolutions in stages with a max-pool behind each."""
    end = "bn_relu_max_pool" if HAS_MAX_POOL else "bn_relu"
    if HAS_CONVOLUTIONS:
        forward = {"conv_stats": convolutions, end: stages}
        return {**forward, "conv_bn_backward": convolutions, f"{end}_backward": stages}
    applied = collections.Counter(bn_relu=convolutions - stages) + collections.Counter(
        {end: stages}
    )
    backward = {f"{op}_backward": count for op, count in applied.items()}
    return {"bn_stats": convolutions, **applied, **backward}


# Whether the convolutions and the pooling are our own on this processor's level.
_PIXELS = torch.zeros(1, 2, 2, 1).permute(0, 3, 1, 2)
HAS_CONVOLUTIONS = ops.has_conv_kernel(_PIXELS, torch.zeros(1, 1, 1, 1))
HAS_MAX_POOL = ops.has_max_pool_kernel(_PIXELS, kernel_size=3, stride=2, padding=1)


EXPECTED_OPS = {
    "resnet18": resnet_ops(8, 2, anew=(1, 3)),
    "resnet34": resnet_ops(16, 2, anew=(5, 3)),
    "resnet50": resnet_ops(16, 3, anew=(4, 4)),
    "resnext50_32x4d": resnet_ops(16, 3, anew=(4, 4)),
    "cifar_resnet18": resnet_ops(8, 2, anew=(1, 3), pooled=False),
    "vgg11_bn": vgg_ops(convolutions=8, stages=5),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", EXPECTED_OPS)
def test_kernels_run(name, layout, monkeypatch):
    if name == "vgg11_bn":  # as VGG, with a head that a test can afford
        features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], True)
        model = models.convert(torchvision.models.VGG(nn.Identity(), init_weights=False))
        model.features, model.classifier = models.convert(features), nn.Identity()
    else:
        model = getattr(models, name)(num_classes=10)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)
    with profile() as profiler:
        model(x).sum().backward()
    counts = collections.Counter(event.name for event in profiler.events())
    seen = {k[12:]: n for k, n in counts.items() if k.startswith("fastresnet::")}
    assert seen == EXPECTED_OPS[name]
    assert not [name for name in counts if "batch_norm" in name]


# What people do with models


@pytest.fixture(scope="module")
def networks():
    return pair()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_feature_extraction(networks, training):
    stock, ours = (copy.deepcopy(model).train(training) for model in networks)
    assert get_graph_node_names(ours) == get_graph_node_names(stock)
    nodes = ["relu", "layer2.0.relu_1", "layer3.0.add", "flatten"]
    x = torch.randn(2, 3, 64, 64)
    ours, stock = (create_feature_extractor(m, nodes)(x) for m in (ours, stock))
    for name in nodes:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-3, atol=1e-4)


def test_intermediate_layer_getter(networks):
    layers = {"layer1": "low", "layer4": "high"}
    x = torch.randn(2, 3, 64, 64)
    stock, ours = (IntermediateLayerGetter(copy.deepcopy(m), layers)(x) for m in networks)
    assert list(ours) == list(stock)
    for name, value in ours.items():
        torch.testing.assert_close(value, stock[name], rtol=1e-3, atol=1e-4)


def test_copies(networks):
    model, x = networks[1].eval(), torch.randn(2, 3, 64, 64)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = model(x)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(twin) is models.ResNet
        assert_same_state(twin, model)
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(networks, training):
    model = copy.deepcopy(networks[1]).train(training)
    x = torch.randn(3, 3, 64, 64)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    targets = {str(node.target) for node in program.graph.nodes}
    assert "fastresnet.bn_add_bn_relu.default" in targets
    x = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(networks, training, backend):
    eager = copy.deepcopy(networks[1]).train(training)
    model = copy.deepcopy(eager)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    results = [step(eager, x, target), step(compiled, x, target)]
    for (name, a), b in zip(results[0].items(), results[1].values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)


def test_jit_script_compiles_torchvisions_code(networks):
    model, x = copy.deepcopy(networks[1]).eval(), torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still used
        scripted = torch.jit.script(model)
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(model.layer1[0]) is BasicBlock


DDP_PROCESS = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fastresnet import models
from fastresnet.nn import BasicBlock
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
x = torch.randn(2, 2, 3, 64, 64)
expected = [torch.zeros_like(p) for p in model.parameters()]
for half in x:  # each process's gradients, alone
    model.zero_grad()
    model(half).square().mean().backward()
    expected = [e + p.grad / 2 for e, p in zip(expected, model.parameters())]
model.zero_grad()
parallel = DistributedDataParallel(model)
parallel(x[rank]).square().mean().backward()
for (name, p), e in zip(model.named_parameters(), expected):
    torch.testing.assert_close(p.grad, e, rtol=1e-3, atol=1e-5, msg=name)
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    root = str(Path(fastresnet.__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP_PROCESS, str(rank), str(tmp_path / "store")],
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr


def test_inputs_that_torchvision_refuses_or_takes(networks):
    stock, ours = networks
    for bad in (
        torch.randn(2, 2, 64, 64),
        torch.randn(2, 64),
        [1, 2],
        torch.ones(2, 3, 64, 64).int(),
    ):
        caught = []
        for model in (stock, ours):
            with pytest.raises((RuntimeError, TypeError, ValueError)) as info:
                model.train()(bad)
            caught.append(info)
        assert type(caught[0].value) is type(caught[1].value)
    for model in (stock, ours):
        assert model(torch.randn(0, 3, 64, 64)).shape == (0, 10)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model.train()(torch.randn(1, 3, 32, 32))


def test_cifar_resnet18():
    model = models.cifar_resnet18(num_classes=5, in_channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert model.layer1(model.conv1(torch.randn(1, 1, 32, 32))).shape == (1, 64, 32, 32)
    assert sum(p.numel() for p in models.cifar_resnet18().parameters()) == 11_173_962
