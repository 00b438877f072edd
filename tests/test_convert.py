# SPDX-License-Identifier: Apache-2.0
"""``convert`` and ``revert``: known classes, Sequentials and blocks written by hand."""

from __future__ import annotations

import collections
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.profiler import profile
from torchvision.ops.misc import Conv2dNormActivation

from fastresnet import models, ops
from fastresnet.models import convert, revert
from fastresnet.nn import BasicBlock, FusedSequential


class Block(nn.Module):
    """Parts of the hand-written blocks below."""

    def __init__(self, inplanes=8, planes=8, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        self.shortcut = nn.Sequential()
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )


class Functional(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class LineByLine(Block):
    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class AddInTheCall(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(x)
        y = self.bn1(y)
        y = F.relu(y, inplace=True)
        y = self.conv2(y)
        y = self.bn2(y)
        return self.relu(x + y)


class OneExpression(Block):
    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class NewNames(Block):
    def forward(self, x):
        a = self.conv1(x)
        b = self.bn1(a)
        c = self.relu(b)
        d = self.bn2(self.conv2(c))
        e = d + x
        return F.relu(e)  # e is not d: only the first pair is sure


class UsedTwice(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.relu(out) + out


class InPlaceShortcut(Block):
    """A batch norm of x itself must not wait while the shortcut changes x."""

    def forward(self, x):
        x = x * 1
        out = self.bn1(x)
        out = out + F.relu_(x)
        return F.relu(out)


class PreActivation(Block):
    def forward(self, x):
        out = F.relu(self.bn1(x))
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + x


class Switches(Block):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        if self.training:
            out = out * 2
        return out * self.stride_of_mood

    stride_of_mood = 1


class Attempts(Block):
    def forward(self, x):
        try:
            out = self.bn1(self.conv1(x))
            return self.relu(out)
        finally:
            x = None


# class, stride -> the operators that a forward must call
HAND_WRITTEN = {
    "functional": (Functional, 1, {"bn_relu": 1, "bn_add_relu": 1}),
    "functional_dual": (Functional, 2, {"bn_relu": 1, "bn_add_bn_relu": 1}),
    "line_by_line": (LineByLine, 1, {"bn_relu": 1, "bn_add_relu": 1}),
    "add_in_the_call": (AddInTheCall, 1, {"bn_relu": 1, "bn_add_relu": 1}),
    "one_expression": (OneExpression, 1, {"bn_relu": 1, "bn_add_relu": 1}),
    "new_names": (NewNames, 1, {"bn_relu": 1}),
    "used_twice": (UsedTwice, 1, {}),
    "in_place_shortcut": (InPlaceShortcut, 1, {}),
    "pre_activation": (PreActivation, 1, {"bn_relu": 2}),
    "switches": (Switches, 1, {"bn_relu": 1}),
    "attempts": (Attempts, 1, {}),
}


def count_ops(function) -> dict[str, int]:
    with profile() as profiler:
        function()
    names = (event.name for event in profiler.events())
    return collections.Counter(
        name.removeprefix("fastresnet::") for name in names if name.startswith("fastresnet::")
    )


def forward_ops(model, x) -> dict[str, int]:
    counts = count_ops(lambda: model(x))
    counts.pop("bn_stats", None)
    return dict(counts)


@pytest.mark.parametrize(("cls", "stride", "expected"), HAND_WRITTEN.values(), ids=HAND_WRITTEN)
def test_hand_written_blocks(cls, stride, expected):
    torch.manual_seed(0)
    stock = cls(8, 8, stride)
    ours = convert(copy.deepcopy(stock))
    assert isinstance(ours, cls)
    assert (type(ours) is cls) == (not expected)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    x = torch.randn(3, 8, 8, 8)
    for training in (True, False):
        results = []
        for model in (ours.train(training), stock.train(training)):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            out = model(leaf)
            if cls is not InPlaceShortcut:  # autograd itself refuses that one
                out.square().sum().backward()
            grads = [] if leaf.grad is None else [leaf.grad]
            results.append([out, *grads, *model.buffers()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert forward_ops(ours, x) == expected
    assert type(revert(ours)) is cls


def test_nothing_is_frozen():
    stock = Switches()
    ours = convert(copy.deepcopy(stock))
    x = torch.randn(2, 8, 6, 6)
    for training, mood in ((True, 1), (False, 3), (True, 5)):
        for model in (stock, ours):
            model.train(training).stride_of_mood = mood
        torch.testing.assert_close(ours(x), stock(x))
    for model in (stock, ours):  # parts may be exchanged after conversion
        model.relu, model.bn1 = nn.SiLU(), nn.Identity()
    torch.testing.assert_close(ours(x), stock(x))


def test_the_running_code_is_what_is_rewritten(tmp_path, monkeypatch):
    """A source edited after it was imported must not change what the model computes."""
    text = (
        "import torch.nn.functional as F\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.bn = nn.BatchNorm2d(4)\n\n"
        "    def forward(self, x):\n        return F.relu(self.bn(x)) + {number}\n"
    )
    path = tmp_path / "edited_net.py"
    path.write_text(text.format(number=1))
    monkeypatch.syspath_prepend(str(tmp_path))
    import edited_net

    assert type(convert(edited_net.Net())) is not edited_net.Net
    path.write_text(text.format(number=200))

    class Fresh(edited_net.Net):  # not seen before, so nothing is remembered
        pass

    assert type(convert(Fresh())) is Fresh


def test_torchvision_resnet_is_converted_in_place():
    model = torchvision.models.resnet18(num_classes=5)
    parameters, modules = list(model.parameters()), list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys = list(model.state_dict())
    classes = [type(module) for module in modules]
    assert convert(model) is model
    assert type(model) is models.ResNet
    assert type(model.layer1[0]) is BasicBlock
    assert type(model.layer1) is nn.Sequential
    fused = [type(module) for module in modules]
    assert convert(model) is model
    assert [type(module) for module in modules] == fused
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == keys
    before = model.fc.weight.clone()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.fc.weight, before)
    assert revert(model) is model
    assert [type(module) for module in model.modules()] == classes


def test_revert_of_our_models_is_torchvisions():
    model = revert(models.resnet18(num_classes=3))
    stock = torchvision.models.resnet18(num_classes=3)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_sequential_subclasses_and_nested_chains():
    net = nn.Sequential(
        Conv2dNormActivation(3, 8),
        nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()),
    )
    stock = copy.deepcopy(net)
    x = torch.randn(2, 3, 12, 12)
    convert(net)
    assert isinstance(net[0], Conv2dNormActivation)
    assert type(net[1]) is FusedSequential
    assert type(net[2]) is type(net) is nn.Sequential
    torch.testing.assert_close(net(x), stock(x))
    assert forward_ops(net, x) == {"bn_relu": 2}
    assert [type(m) for m in revert(net).modules()] == [type(m) for m in stock.modules()]


def test_hooks_survive_conversion():
    block, seen = Functional(), []
    block.register_forward_hook(lambda module, args, out: seen.append("block"))
    block.bn1.register_forward_hook(lambda module, args, out: seen.append("bn1"))
    convert(block)(torch.randn(2, 8, 6, 6))
    assert seen == ["bn1", "block"]


@pytest.mark.parametrize(
    "make",
    [
        Functional,
        lambda: Conv2dNormActivation(8, 8),
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
    ],
    ids=["hand_written", "sequential_subclass", "sequential"],
)
def test_converted_modules_are_copied_and_pickled(make, tmp_path):
    torch.manual_seed(0)
    model = convert(make())
    x = torch.randn(2, 8, 6, 6)
    torch.save(model, tmp_path / "model.pt")
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    expected = model(x)
    for twin in twins:
        assert type(twin) is type(model)
        assert torch.equal(twin(x), expected)
        assert torch.equal(
            twin.state_dict()[next(iter(model.state_dict()))],
            next(iter(model.state_dict().values())),
        )


def test_compile_of_a_converted_block():
    torch.manual_seed(0)
    block = convert(Functional(8, 8, 2))
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("densenet121", {}, {"bn_relu": 120, "bn": 1}),
        ("shufflenet_v2_x0_5", {}, {"bn_relu": 37, "bn": 19}),
        ("regnet_x_400mf", {}, {"bn_relu": 45, "bn": 26}),
        ("googlenet", {"init_weights": False, "aux_logits": False}, {"bn_relu": 57}),
    ],
)
def test_other_torchvision_networks(name, options, expected):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=4, **options).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        convert(model)
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-5)
        found = forward_ops(model, x)
        # With the max-pool behind it, or folded into the convolution in front, where a level has a
        # kernel for that.
        found["bn_relu"] += found.pop("bn_relu_max_pool", 0) + found.pop("conv_relu_sequence", 0)
        assert found == expected


def test_layer_getter_over_a_converted_backbone():
    """Detection and segmentation take the children out: no channels_last entry is called."""
    from torchvision.models._utils import IntermediateLayerGetter

    torch.manual_seed(0)
    backbone = torchvision.models.resnet18().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = IntermediateLayerGetter(backbone, {"layer2": "a", "layer4": "b"})(x)
        getter = IntermediateLayerGetter(convert(backbone), {"layer2": "a", "layer4": "b"})
        after = getter(x)
        for key in before:
            torch.testing.assert_close(after[key], before[key], rtol=1e-3, atol=1e-4)
        # Folded, a call a block, but for the first one, whose input is NCHW, where a level has a
        # kernel for that.
        folded = {"bn_relu": 1, "bn_add_relu": 1, "conv_relu_sequence": 7}
        apart = {"bn_relu": 8, "bn_add_relu": 5, "bn_add_bn_relu": 3}
        found = forward_ops(getter, x)
        assert found == (folded if "conv_relu_sequence" in found else apart)


@pytest.mark.parametrize("function", [convert, revert])
@pytest.mark.parametrize("argument", [None, "resnet18", torchvision.models.resnet18])
def test_not_a_module(function, argument):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got"):
        function(argument)


def test_kernels_are_loaded():
    assert ops.has_kernel(torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last))
