# SPDX-License-Identifier: Apache-2.0
"""The networks that are not torchvision's, against the same ones written in torch.nn alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_conv import nodes
from test_models import assert_no_further_from_float64, assert_same_state
from torch import Tensor, nn

from fastresnet import models


class PlainBlock(nn.Module):
    """Convolutions with batch norm, and a shortcut."""

    def __init__(
        self, convs: Sequence[nn.Conv2d], projection: nn.Conv2d | None, channels: int
    ) -> None:
        super().__init__()
        self.count = len(convs)
        for index, conv in enumerate(convs, start=1):
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", nn.BatchNorm2d(conv.out_channels))
        if projection is not None:
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for index in range(1, self.count + 1):
            out = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(out))
            out = F.relu(out) if index < self.count else out
        return F.relu(out + (self.downsample(x) if hasattr(self, "downsample") else x))


class PlainResNet(nn.Module):
    def __init__(self, in_channels: int, bias: bool, stages: dict[str, list], **ends) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=bias)
        self.bn1 = nn.BatchNorm2d(64)
        self.stages = list(stages)
        for name, blocks in (stages | ends).items():
            self.add_module(name, nn.Sequential(*blocks) if isinstance(blocks, list) else blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def plain_basic(channels: int, planes: int, stride: int = 1) -> PlainBlock:
    convs = [
        nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=False),
        nn.Conv2d(planes, planes, 3, padding=1, bias=False),
    ]
    projects = stride != 1 or channels != planes
    projection = nn.Conv2d(channels, planes, 1, stride=stride, bias=False) if projects else None
    return PlainBlock(convs, projection, planes)


def plain_bottleneck(channels: int, planes: int, stride: int = 1) -> PlainBlock:
    convs = [
        nn.Conv2d(channels, planes, 1, stride=stride),
        nn.Conv2d(planes, planes, 3, padding=1),
        nn.Conv2d(planes, 4 * planes, 1),
    ]
    return PlainBlock(convs, nn.Conv2d(channels, 4 * planes, 1, stride=stride), 4 * planes)


def plain_truncated(in_channels: int) -> nn.Module:
    return PlainResNet(
        in_channels,
        bias=False,
        stages={
            "layer1": [plain_basic(64, 64), plain_basic(64, 64)],
            "layer2": [plain_basic(64, 128, 2), plain_basic(128, 128)],
        },
        avgpool=nn.AdaptiveAvgPool2d(1),
        fc=[nn.Linear(128, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 10)],
    )


def plain_projection(in_channels: int, depths: Sequence[int] = (3, 4, 6, 3)) -> nn.Module:
    stages: dict[str, list] = {}
    channels = 64
    for index, depth in enumerate(depths):
        planes, stages[f"layer{index + 1}"] = 64 << index, []
        for block in range(depth):
            stride = 2 if index > 0 and block == 0 else 1
            stages[f"layer{index + 1}"].append(plain_bottleneck(channels, planes, stride))
            channels = 4 * planes
    head = [nn.Dropout(0.0), nn.Linear(8192, 10)]
    return PlainResNet(
        in_channels, bias=True, stages=stages, avgpool=nn.AdaptiveAvgPool2d(2), fc=head
    )


class PlainSimpleCNN(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(in_channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            nn.MaxPool2d(2),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            nn.MaxPool2d(2),
        )
        self.fc = nn.Linear(4096, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.features(x), 1))


def shallow(model: models.ResNet, depths: Sequence[int]) -> models.ResNet:
    for name, depth in zip(("layer1", "layer2", "layer3", "layer4"), depths, strict=True):
        setattr(model, name, getattr(model, name)[:depth])
    return model


# Ours, the same in torch.nn, and the size of the images. A shallow projection network: the shortcut
# without a stride and the one with it, without the luck of rounding in sixteen blocks.
SHALLOW = (2, 1, 1, 1)
PAIRS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module], int]] = {
    "simple_cnn": (lambda c: models.simple_cnn(10, c, dropout=0.0), PlainSimpleCNN, 32),
    "resnet18_truncated": (lambda c: models.resnet18_truncated(10, c), plain_truncated, 48),
    "resnet50_projection": (
        lambda c: shallow(models.resnet50_projection(10, c, dropout=0.0), SHALLOW),
        lambda c: plain_projection(c, SHALLOW),
        64,
    ),
}


def pair(name: str, in_channels: int = 3) -> tuple[nn.Module, nn.Module, int]:
    """Ours and plain torch's with the same weights, none of them at its initial zeros and ones,
    and the size of the images."""
    ours, plain, size = PAIRS[name]
    ours, plain = ours(in_channels), plain(in_channels)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.5, 0.5)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain, size


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", PAIRS)
def test_numbers(name: str, autocast: bool) -> None:
    ours, plain, size = pair(name)
    inputs = torch.randn(3, 4, 3, size, size)
    assert_no_further_from_float64(plain, ours, inputs, autocast=autocast)


@pytest.mark.parametrize("name", PAIRS)
def test_float64_is_plain_torch(name: str) -> None:
    ours, plain, size = (m.double() if isinstance(m, nn.Module) else m for m in pair(name))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), plain.train(training)(x))
    for ours_buffer, plain_buffer in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours_buffer, plain_buffer)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_grey_images_without_gradients(name: str, layout: torch.memory_format) -> None:
    ours, plain, size = pair(name, in_channels=1)
    x = torch.randn(3, 1, size, size).contiguous(memory_format=layout)
    with torch.inference_mode():
        got, expected = ours.eval()(x), plain.eval()(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "node", "count"),
    [
        ("simple_cnn", "_ChainBackward", 1),  # the first convolution has three channels
        ("resnet18_truncated", "_ResidualBlockBackward", 4),
        ("resnet50_projection", "_ResidualBlockBackward", 5),
    ],
)
@pytest.mark.usefixtures("convolutions_at_every_level")
def test_they_run_fused(name: str, node: str, count: int) -> None:
    ours, _, size = pair(name)
    assert nodes(ours(torch.randn(2, 3, size, size))).count(node) == count


@pytest.mark.parametrize("name", PAIRS)
def test_state_and_reverting(name: str) -> None:
    ours, plain, size = pair(name)
    twin = PAIRS[name][0](3)
    twin.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(twin, plain)
    x = torch.randn(2, 3, size, size)
    expected = ours.eval()(x)
    assert torch.equal(twin.eval()(x), expected)

    types = [type(module) for module in twin.modules()]
    models.revert(twin)
    origins = {type(module).__module__.partition(".")[0] for module in twin.modules()}
    assert origins <= {"torch", "torchvision"}
    assert_same_state(twin, plain)
    torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)
    models.convert(twin)
    assert [type(module) for module in twin.modules()] == types
    assert torch.equal(copy.deepcopy(twin)(x), expected)


# All depths and heads, on images as small as they take


def narrow_vgg19(num_classes: int) -> nn.Module:
    """VGG19's convolutions with a classifier that a test can afford."""
    with torch.device("meta"):
        model = models.vgg19_bn(num_classes=num_classes, init_weights=False)
    model.features.to_empty(device="cpu")
    for module in model.features:
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
    return model


# With the learning rates of their recipes, or about those. The projection network has no identity
# path: its gradients are thousands of times its weights at first, and 0.01 is too much, for plain
# torch too.
TRAINED: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], float]] = {
    "retinopathy": (lambda: models.resnet18(num_classes=5), (4, 64), 0.01),
    "retinopathy_lab3": (lambda: models.lab3_head(models.resnet18(), 256, 5), (2, 256), 0.001),
    "butterflies_vgg19": (lambda: narrow_vgg19(100), (4, 32), 0.01),
    "butterflies_resnet50": (lambda: models.resnet50_projection(100), (4, 64), 0.001),
    "mnistm": (lambda: models.resnet18_truncated(), (4, 64), 0.01),
    "cifar10_simple_cnn": (lambda: models.simple_cnn(), (4, 32), 0.003),
    "cifar10_resnet18": (lambda: models.cifar_resnet18(), (4, 32), 0.01),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_falls(name: str, precision: str) -> None:
    make, (batch, size), lr = TRAINED[name]
    model = make().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            out = model(x)
        loss = F.cross_entropy(out.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


# Shapes and options


def test_vgg19_of_100_classes() -> None:
    with torch.device("meta"):
        model = models.vgg19_bn(num_classes=100)
    assert sum(isinstance(module, nn.Conv2d) for module in model.features) == 16
    sizes = [(m.in_features, m.out_features) for m in model.classifier if isinstance(m, nn.Linear)]
    assert sizes == [(25088, 4096), (4096, 4096), (4096, 100)]
    assert [m.p for m in model.classifier if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    pools = [i for i, m in enumerate(model.features) if isinstance(m, nn.MaxPool2d)]
    convolutions = [i for i, m in enumerate(model.features) if isinstance(m, nn.Conv2d)]
    assert [sum(i < pool for i in convolutions) for pool in pools] == [2, 4, 8, 12, 16]


def test_projection_network_is_what_its_report_describes() -> None:
    with torch.device("meta"):
        model = models.resnet50_projection()
    blocks = [m for m in model.modules() if isinstance(m, torchvision.models.resnet.Bottleneck)]
    assert len(blocks) == 16
    for block in blocks:
        projection, bn = block.downsample
        assert (projection.kernel_size, type(bn)) == ((1, 1), nn.BatchNorm2d)
        assert projection.stride == block.conv1.stride
        assert block.conv2.stride == block.conv3.stride == (1, 1)
    strides = [block.conv1.stride[0] for block in blocks]
    assert strides == [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1]
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (model.fc[0].p, model.fc[1].in_features, model.fc[1].out_features) == (0.5, 8192, 100)


@pytest.mark.parametrize(
    ("image_size", "features"), [(512, 51200), (500, 51200), (256, 2048), (224, 512), (128, 512)]
)
def test_lab3_head(image_size: int, features: int) -> None:
    with torch.device("meta"):
        model = models.lab3_head(models.resnet18(), image_size, 5)
        assert model.fc.in_features == features
        assert model.eval()(torch.empty(1, 3, image_size, image_size)).shape == (1, 5)


def test_lab3_head_of_resnet50() -> None:
    with torch.device("meta"):
        model = models.lab3_head(models.resnet50(), 512, 5)
        assert model.fc.in_features == 204_800
        assert model.eval()(torch.empty(1, 3, 512, 512)).shape == (1, 5)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="image_size: expected at least 4, got 3"):
        models.simple_cnn(image_size=3)
    with torch.device("meta"):
        model = models.resnet18()
    with pytest.raises(ValueError, match="image_size: expected at least 1, got 0"):
        models.lab3_head(model, 0, 5)
    models.lab3_head(model, 512, 5)
    for wrong in (model, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="expected a ResNet whose avgpool is AdaptiveAvgPool2d"):
            models.lab3_head(wrong, 512, 5)


def test_simple_cnn_of_other_images() -> None:
    assert models.simple_cnn(7, 1, image_size=28)(torch.randn(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize("image_size", [32, 224, 512])
def test_lab3_head_is_refused_where_the_stride_is_another(image_size: int) -> None:
    # Its map of 512 x 512 would be 64 x 64: a linear layer of 58 x 58 x 512 inputs that no image
    # then fits.
    with torch.device("meta"):
        model = models.cifar_resnet18()
    message = (
        rf"expected a ResNet of total stride 32, .* got one that makes {(image_size // 8) ** 2}"
    )
    with pytest.raises(TypeError, match=message):
        models.lab3_head(model, image_size, 5)


@pytest.mark.parametrize("image_size", [1, 33, 100, 256])
@pytest.mark.parametrize("kind", [models, torchvision.models])
def test_lab3_head_takes_the_images_it_is_made_for(image_size: int, kind: ModuleType) -> None:
    model = models.lab3_head(kind.resnet18(), image_size, 5).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, image_size, image_size)).shape == (1, 5)
