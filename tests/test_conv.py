# SPDX-License-Identifier: Apache-2.0
"""The convolutions of our own against their twins in float64, operator by operator and as a block,
with torch's own error as the yardstick."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import channels_last
from tolerances import ERROR_RATIO, assert_no_worse, error
from torch import Tensor, nn
from torchvision.models import resnet

import fastresnet
from fastresnet import ops
from fastresnet.memory import empty_images
from fastresnet.nn import residual
from fastresnet.ops import Normalized, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, channels, height, width, out_channels
SHAPES = {
    "whole_blocks": (2, 64, 14, 14, 64),
    "several_images_a_block": (5, 32, 7, 5, 96),
    "tails": (1, 40, 9, 11, 20),
    "few_channels": (2, 3, 8, 8, 33),
    "one_pixel": (4, 64, 1, 1, 32),
    "several_blocks_an_image": (1, 64, 61, 58, 32),
    # Shared out by channels; the second by rows too.
    "more_weights_than_pixels": (3, 160, 3, 4, 192),
    "deep_and_narrow": (2, 512, 4, 3, 32),
}
# Enough tiles for Winograd's minimal filtering: batch, channels, height, width, out_channels.
TILED_SHAPES = {
    "whole_tiles": (8, 64, 16, 16, 64),
    "tails_of_all": (7, 40, 13, 11, 72),
    "several_blocks_an_image": (1, 32, 70, 65, 32),
    "several_images_a_block": (40, 96, 7, 7, 32),
    "two_rows": (6, 32, 2, 130, 64),
    # Shared out by channels, the weight's gradient some blocks at a time.
    "more_weights_than_pixels": (15, 288, 7, 8, 64),
}
# Maps so small that most taps meet padding, of enough images: planes hold place after place.
PLACED_SHAPES = {
    "smallest_maps": (64, 64, 2, 2, 64),
    "one_pixel": (45, 40, 1, 1, 72),
    "uneven_maps": (39, 32, 3, 2, 64),
    # Shared out by channels; the second by images too.
    "more_weights_than_pixels": (19, 96, 2, 3, 160),
    "deep_and_narrow": (17, 320, 2, 2, 32),
}
# kernel, stride, padding, dilation, groups
GEOMETRIES = {
    "1x1": (1, 1, 0, 1, 1),
    "3x3": (3, 1, 1, 1, 1),
    "3x3/2": (3, 2, 1, 1, 1),
    "1x1/2": (1, 2, 0, 1, 1),
    "3x3_unpadded": (3, 1, 0, 1, 1),
    "3x3_dilated": (3, 1, 2, 2, 1),
    "7x7/2": (7, 2, 3, 1, 1),
    "5x5_wide_padding": (5, 3, 4, 1, 1),
}
# Images, and convolutions of so few channels: batch, channels, height, width, out_channels.
IMAGES = {
    "several_blocks": (2, 3, 61, 58, 64),
    "smaller_than_the_kernel": (9, 3, 5, 6, 40),
    "grey": (3, 1, 19, 32, 32),
    "more_weights_than_pixels": (1, 3, 7, 7, 192),
}
# Of 1x1 convolutions of stride 1, whose pixels are rows of a product as they lie in memory.
PIXELS = {
    "whole_tiles": (2, 64, 14, 16, 64),
    "tails_of_rows": (3, 96, 13, 11, 40),
    "several_blocks_a_thread": (1, 32, 61, 58, 32),
    # Shared out by channels; the second by rows too.
    "more_weights_than_pixels": (3, 160, 3, 4, 192),
    "deep_and_narrow": (2, 992, 4, 3, 32),
}
# channels, groups
GROUPS = {
    "half_blocks": (96, 6),
    "quarter_blocks": (64, 8),
    "pairs": (72, 36),
    "fours_in_a_part": (44, 11),
    "whole_blocks": (96, 3),
    "two_blocks": (128, 2),
    "depthwise": (40, 40),
}


pytestmark = pytest.mark.usefixtures("convolutions_at_every_level")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch computes with, until the test's end."""
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


def normalized(x: Tensor) -> Normalized:
    channels = x.shape[1]
    mean, var = torch.randn(channels) * 0.3, torch.rand(channels) + 0.5
    return Normalized(
        x, mean, var, torch.rand(channels) + 0.5, torch.randn(channels) * 0.3, 1e-5, False
    )


def to_float64(value):
    if isinstance(value, Normalized):
        return Normalized(*(t.double() for t in value[:5]), *value[5:])
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def run(
    module, x, weight, grad, mask, bn_weight, addend, addend_mask, geometry, y=None, wants_dx=True
):
    """Forward and backward of one convolution; ``y`` replaces the forward's output, so that the
    backward of all is asked for the same."""
    names = dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True))
    out, mean, var = module.conv_stats(x, weight, **names)
    results = {"y": out, "mean": mean, "var": var}
    y = Normalized(
        out if y is None else y, *module.bn_stats(out if y is None else y), bn_weight,
        torch.zeros_like(bn_weight), 1e-5, True,
    )  # fmt: skip
    sums, _ = module.bn_sums(grad, mask, y.x, y.mean)
    gradients = module.conv_bn_backward(
        *(grad, mask, sums, y, x, weight),
        **names,
        addend=addend,
        addend_mask=addend_mask,
        wants_dx=wants_dx,
    )
    return results | {"first_sums": sums} | gradients._asdict()


def method(
    x: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    *,
    backward: bool,
    normalised: bool = True,
    wants_dx: bool = True,
) -> str:
    """Which products a convolution is made of."""
    tile, *special = torch.ops.fastresnet.conv_method(
        x, weight, *geometry, normalised=normalised, backward=backward, wants_dx=wants_dx
    )
    names = [
        name
        for name, is_so in zip(("places", "patches", "in place"), special, strict=True)
        if is_so
    ]
    assert (tile > 1) + len(names) <= 1
    return names[0] if names else f"tiles of {tile}"


def check(shape, geometry, dtype, prologue, wants_dx=True, layout=torch.contiguous_format):
    batch, channels, height, width, out_channels = shape
    kernel, *rest = geometry
    stride, padding, dilation, groups = rest
    group_channels = channels // groups
    weight = torch.randn(out_channels, group_channels, kernel, kernel)
    weight *= (group_channels * kernel**2) ** -0.5
    weight = weight.contiguous(memory_format=layout)
    if min(height, width) + 2 * padding < dilation * (kernel - 1) + 1:
        return
    x = channels_last(batch, channels, height, width, dtype=dtype)
    source = normalized(x) if prologue else x
    # Not torch's own in that dtype: oneDNN's of one column of grey pixels is wrong (torch 2.14.1).
    y = reference.conv_stats(
        to_float64(source),
        weight.double(),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )[0]
    y = y.to(dtype).contiguous(memory_format=torch.channels_last)
    if y.numel() // out_channels < 4:  # no statistics to speak of
        return
    grad = torch.randn(y.shape).to(dtype).contiguous(memory_format=torch.channels_last)

    def bits(like: Tensor) -> Tensor:
        n, c, h, w = like.shape
        return torch.randint(256, (n, h, w, (c + 7) // 8), dtype=torch.uint8)

    mask, addend, addend_mask = bits(y), None, None
    if not prologue and wants_dx:
        addend = channels_last(*x.shape, dtype=dtype)
        addend_mask = bits(x)
    arguments = (source, weight, grad, mask, torch.rand(out_channels) + 0.5, addend, addend_mask)
    ours = run(ops, *arguments, rest, y, wants_dx)
    torchs = run(reference, *arguments, rest, y, wants_dx)
    exact = run(reference, *map(to_float64, arguments), rest, y.double(), wants_dx)
    rows = y.numel() // out_channels
    for name, value in exact.items():
        if value is None:
            assert ours[name] is None
            continue
        if name in ("mean", "var"):  # of the values as stored
            value = dict(zip(("mean", "var"), reference.bn_stats(ours["y"].double()), strict=True))[
                name
            ]
        if name == "sums":  # of dx as stored
            value = reference.bn_sums(ours["x"].double(), None, x.double(), source.mean.double())[0]
        assert ours[name].shape == value.shape, name
        if name == "weight":
            assert ours[name].is_contiguous(memory_format=layout)
        largest = ours["y"].double().abs().max().item()  # a mean is a sum of these
        scale = {"first_sums": rows, "sums": x.numel() / channels, "mean": largest}.get(name)
        scale = value.abs().max().item() if scale is None else scale
        if name in ("weight", "bn_weight", "bn_bias"):
            scale = max(scale, rows**0.5)
        peer = torchs[name]
        if not peer.isfinite().all() or peer.abs().max() > 1e3 * max(scale, 1e-3):
            # oneDNN leaves the taps of a weight that never meet a pixel unwritten (torch 2.14.1).
            peer = value.to(dtype)
            scale *= torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        assert_no_worse(ours[name], peer, value, name, scale)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, geometry, dtype, prologue):
    check(shape, geometry, dtype, prologue)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TILED_SHAPES.values(), ids=TILED_SHAPES)
def test_minimal_filtering_against_float64(shape, dtype, prologue):
    batch, channels, height, width, out_channels = shape
    x = channels_last(batch, channels, height, width, dtype=dtype)
    weight = torch.empty(out_channels, channels, 3, 3)
    small = dtype == torch.float32 or min(height, width) <= 2
    on_tiles = torch.ops.fastresnet.isa() == "amx" and dtype == torch.bfloat16
    for backward in (False, True):
        made_of = method(x, weight, (1, 1, 1, 1), backward=backward)
        expected = ("tiles of 1", "places") if on_tiles else (f"tiles of {2 if small else 4}",)
        assert made_of in expected
    check(shape, GEOMETRIES["3x3"], dtype, prologue)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", ["3x3", "3x3/2"])
@pytest.mark.parametrize("shape", PLACED_SHAPES.values(), ids=PLACED_SHAPES)
def test_planes_of_places_against_float64(shape, geometry, dtype, prologue):
    batch, channels, height, width, out_channels = shape
    kernel, *rest = GEOMETRIES[geometry]
    x = channels_last(batch, channels, height, width, dtype=dtype)
    weight = torch.empty(out_channels, channels, kernel, kernel)
    for backward in (False, True):
        assert method(x, weight, rest, backward=backward) == "places"
    check(shape, GEOMETRIES[geometry], dtype, prologue)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 16, 64])
def test_planes_of_places_in_groups(width, dtype):
    channels, groups = 128, 128 // width
    x = channels_last(33, channels, 2, 2, dtype=dtype)
    weight = torch.empty(channels, width, 3, 3)
    assert method(x, weight, (1, 1, 1, groups), backward=True) == "places"
    check((33, channels, 2, 2, channels), (3, 1, 1, 1, groups), dtype, prologue=True)


def test_minimal_filtering_is_for_what_it_saves_products_of():
    x = channels_last(8, 64, 16, 16, dtype=torch.float32)
    square, row = torch.empty(64, 64, 3, 3), torch.empty(64, 64, 1, 3)

    def filtered(x: Tensor, weight: Tensor, *geometry: int) -> bool:
        return method(x, weight, geometry, backward=False) == "tiles of 2"

    assert filtered(x, square, 1, 1, 1, 1)
    for geometry in ((2, 1, 1, 1), (1, 0, 1, 1), (1, 2, 2, 1)):
        assert not filtered(x, square, *geometry)
    assert not filtered(x, row, 1, 1, 1, 1)
    assert not filtered(x, torch.empty(64, 32, 3, 3), 1, 1, 1, 2)
    # One image of 7 x 7 has too few tiles to be worth transforming the weight.
    assert not filtered(channels_last(1, 64, 7, 7, dtype=torch.float32), square, 1, 1, 1, 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", ["3x3", "7x7/2", "5x5_wide_padding"])
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
def test_patches_against_float64(shape, geometry, dtype, layout):
    batch, channels, height, width, out_channels = shape
    kernel, *rest = GEOMETRIES[geometry]
    x = channels_last(batch, channels, height, width, dtype=dtype)
    weight = torch.empty(out_channels, channels, kernel, kernel)
    for backward in (False, True):
        made_of = method(x, weight, rest, normalised=False, backward=backward, wants_dx=False)
        assert made_of == "patches"
    check(shape, GEOMETRIES[geometry], dtype, False, wants_dx=False, layout=layout)


def test_patches_are_of_few_channels_as_they_are():
    x = channels_last(4, 3, 16, 16, dtype=torch.float32)
    weight = torch.empty(32, 3, 3, 3)
    plain = {"normalised": False, "wants_dx": False}

    def patched(x: Tensor, weight: Tensor, *geometry: int, backward: bool, **how: bool) -> bool:
        how = plain | how
        return method(x, weight, geometry, backward=backward, **how) == "patches"

    assert patched(x, weight, 1, 1, 1, 1, backward=False)
    assert patched(x, weight, 1, 1, 1, 1, backward=False, wants_dx=True)
    assert patched(x, weight, 1, 1, 1, 1, backward=True)
    assert not patched(x, weight, 1, 1, 1, 1, backward=True, wants_dx=True)
    assert not patched(x, weight, 1, 1, 1, 1, backward=False, normalised=True)
    assert not patched(x, weight, 1, 1, 2, 1, backward=False)
    assert not patched(x, torch.empty(3, 1, 3, 3), 1, 1, 1, 3, backward=False)
    # A patch of more values than are staged as one pixel.
    assert not patched(x, torch.empty(32, 3, 15, 15), 1, 7, 1, 1, backward=False)
    wide = channels_last(4, 64, 16, 16, dtype=torch.float32)
    assert not patched(wide, torch.empty(32, 64, 3, 3), 1, 1, 1, 1, backward=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", PIXELS.values(), ids=PIXELS)
def test_pixels_in_place_against_float64(shape, count, dtype, threads):
    threads(count)
    batch, channels, height, width, out_channels = shape
    x = channels_last(batch, channels, height, width, dtype=dtype)
    weight = torch.empty(out_channels, channels, 1, 1)
    made_of = method(x, weight, (1, 0, 1, 1), backward=False, normalised=False)
    assert made_of == ("in place" if dtype in as_in_memory() else "tiles of 1")
    check(shape, GEOMETRIES["1x1"], dtype, prologue=False)


def as_in_memory() -> list[torch.dtype]:
    """Of which a kernel reads rows of memory as they are: what it multiplies in the dtype itself,
    and not in tiles, which have 16 rows."""
    level = torch.ops.fastresnet.isa()
    return [torch.float32] + [torch.bfloat16] * (level == "avx512_bf16")


def test_pixels_in_place_are_of_whole_lines_as_they_are():
    def in_place(channels: int, *geometry: int, size: int = 1, **how: bool) -> bool:
        groups = geometry[3]
        x = channels_last(2, channels, 5, 5, dtype=torch.float32)
        weight = torch.empty(channels, channels // groups, size, size)
        how = {"backward": False, "normalised": False} | how
        return method(x, weight, geometry, **how) == "in place"

    assert in_place(64, 1, 0, 1, 1)
    assert not in_place(64, 1, 0, 1, 1, normalised=True)
    assert not in_place(64, 1, 0, 1, 1, backward=True)
    assert not in_place(64, 2, 0, 1, 1)
    assert not in_place(64, 1, 1, 1, 1)
    assert not in_place(64, 1, 0, 1, 2)
    assert not in_place(64, 1, 1, 1, 1, size=3)
    assert not in_place(48, 1, 0, 1, 1)
    # Pixels 4 KiB apart share their lines of the first-level cache.
    assert in_place(992, 1, 0, 1, 1)
    assert not in_place(1024, 1, 0, 1, 1)


def test_a_patch_reads_its_own_pixels_only():
    """What is behind a row of a patch, and behind its last, never gets into a product."""
    x = channels_last(2, 3, 9, 9, dtype=torch.float32)
    x[0, :, 4, 4] = float("nan")
    y = ops.conv_stats(x, torch.randn(32, 3, 3, 3), padding=1)[0]
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[0, :, 3:6, 3:6] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minimal_filtering_of_what_cancels(dtype):
    """Transforms add inputs of weights up to 25 before the products bring them back: the outputs
    of a mean far from zero and weights that sum to nothing are no worse for that."""
    x = channels_last(8, 64, 16, 16, dtype=torch.float32).add(8).to(dtype)
    weight = torch.randn(64, 64, 3, 3) / 24
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)).to(dtype).float()
    ours = ops.conv_stats(x, weight, padding=1)[0]
    peer = reference.conv_stats(x, weight, padding=1)[0]
    exact = reference.conv_stats(x.double(), weight.double(), padding=1)[0]
    assert_no_worse(ours, peer, exact, "y", exact.abs().max().item())


def test_output_is_no_long_sum():
    """Sixteen times as many products lose about as many bits: they are a sum of sums."""
    torch.manual_seed(0)

    def lost(channels: int) -> float:
        x = channels_last(2, channels, 7, 7, dtype=torch.float32)
        weight = torch.randn(64, channels, 1, 1) / channels**0.5
        exact = reference.conv_stats(x.double(), weight.double())[0]
        return error(ops.conv_stats(x, weight)[0], exact)

    assert lost(4096) <= 2 * lost(256)


# The second is shared out by channels: each of its sums goes over all pixels.
@pytest.mark.parametrize(
    ("shape", "kernel", "count"), [((8, 64, 28, 28), 3, 2), ((16, 96, 14, 14), 1, 96)]
)
def test_weight_gradient_is_no_long_sum(shape, kernel, count, threads):
    """Where the batch norm is in evaluation mode the gradient of y is exact but for one product, so
    that what is lost is lost in adding up."""
    torch.manual_seed(0)
    threads(count)
    channels = shape[1]
    x, y, grad = (channels_last(*shape, dtype=torch.float32) for _ in range(3))
    weight = torch.randn(channels, channels, kernel, kernel) / channels**0.5 / kernel
    bn = Normalized(
        y, *ops.bn_stats(y), torch.rand(channels) + 0.5, torch.zeros(channels), 1e-5, False
    )
    sums = torch.zeros(2, channels, dtype=torch.float64)
    arguments = (grad, None, sums, bn, normalized(x), weight)
    padding = kernel // 2
    made_of = method(x, weight, (1, padding, 1, 1), backward=True)
    assert made_of == f"tiles of {2 if kernel == 3 else 1}"
    ours, torchs = (
        module.conv_bn_backward(*arguments, padding=padding).weight for module in (ops, reference)
    )
    exact = reference.conv_bn_backward(*map(to_float64, arguments), padding=padding).weight
    assert error(ours, exact) <= ERROR_RATIO * error(torchs, exact)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [(5, 64, 9, 7, 64), (40, 96, 7, 7, 32), (360, 256, 4, 4, 256), (45, 320, 2, 2, 64)],
    ids=["few_rows", "rows_and_channels", "several_shared_blocks", "places"],
)
def test_threads_share_alike(shape, kernel, threads):
    """However many threads share a convolution, by blocks or by channels, in one or several blocks
    of pixels that they stage together: the same numbers, but for the order of sums."""
    batch, channels, height, width, out_channels = shape
    x = normalized(channels_last(batch, channels, height, width, dtype=torch.float32))
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    grad = channels_last(batch, out_channels, height, width, dtype=torch.float32)
    arguments = (x, weight, grad, None, torch.ones(out_channels), None, None)
    found = []
    for count in (1, 3, 20):
        threads(count)
        found.append(run(ops, *arguments, (1, kernel // 2, 1, 1)))
    for other in found[1:]:
        for name, value in found[0].items():
            scale = value.abs().max().item()
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", ["1x1", "3x3", "3x3/2", "1x1/2"])
@pytest.mark.parametrize(
    "shape",
    [
        (7, 40, 13, 11, 72),
        (3, 160, 3, 4, 192),
        (34, 288, 4, 4, 64),
        (1, 32, 70, 65, 32),
        (35, 96, 2, 3, 64),
    ],
    ids=["by_blocks", "by_channels", "several_shared_blocks", "blocks_of_rows", "places"],
)
def test_memory_may_hold_anything_before(shape, geometry, dtype):
    """Scratch memory is what results of before have left."""
    batch, channels, height, width, out_channels = shape
    kernel, *rest = GEOMETRIES[geometry]
    x = normalized(channels_last(batch, channels, height, width, dtype=dtype))
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    names = dict(zip(("stride", "padding", "dilation", "groups"), rest, strict=True))
    y = ops.conv_stats(x, weight, **names)[0]
    grad = torch.randn_like(y)
    arguments = (x, weight, grad, None, torch.ones(out_channels), None, None, rest)
    found = []
    for left in (0.0, float("nan")):
        empty_images(1, 256, (256, 256), dtype=torch.float32).fill_(left)
        found.append(run(ops, *arguments))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("pixels", [(3, 9, 8), (4, 5, 3)], ids=str)
def test_groups(pixels, groups, stride, dtype):
    channels, count = groups
    batch, height, width = pixels
    shape = (batch, channels, height, width, channels)
    check(shape, (3, stride, 1, 1, count), dtype, prologue=True)
    check(shape, (1, stride, 0, 1, count), dtype, prologue=False)


@settings(max_examples=60)
@given(
    shape=st.tuples(
        st.integers(1, 5),
        st.integers(1, 70),
        st.integers(1, 20),
        st.integers(1, 20),
        st.integers(1, 70),
    ),
    geometry=st.tuples(
        st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(1, 2), st.just(1)
    ),
    dtype=st.sampled_from(DTYPES),
    prologue=st.booleans(),
)
def test_random_shapes(shape, geometry, dtype, prologue):
    check(shape, geometry, dtype, prologue)


@settings(max_examples=40)
@given(
    pixels=st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    width=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    groups=st.integers(2, 9),
    geometry=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(1, 2)),
    dtype=st.sampled_from(DTYPES),
    prologue=st.booleans(),
)
def test_random_groups(pixels, width, groups, geometry, dtype, prologue):
    batch, height, columns = pixels
    shape = (batch, width * groups, height, columns, width * groups)
    check(shape, (*geometry, groups), dtype, prologue)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_with_a_large_mean(dtype):
    # A 1x1 convolution that adds up two channels: one of mean 1000, one of deviation 1.
    x = channels_last(8, 2, 32, 32, dtype=torch.float32)
    x[:, 0] = 1000
    weight = torch.ones(1, 2, 1, 1)
    y, mean, var = ops.conv_stats(x.to(dtype).contiguous(memory_format=torch.channels_last), weight)
    exact = y.double()
    assert abs(mean.item() - exact.mean().item()) < 1e-3
    assert abs(var.item() / exact.var(correction=0).item() - 1) < 1e-4


def test_contiguous_and_bfloat16_weights():
    x = channels_last(2, 48, 9, 9, dtype=torch.bfloat16)
    weight = torch.randn(40, 48, 3, 3)
    nhwc = weight.contiguous(memory_format=torch.channels_last)
    expected = ops.conv_stats(x, weight, padding=1)
    for other in (nhwc, weight.bfloat16(), nhwc.bfloat16()):
        for ours, wanted in zip(ops.conv_stats(x, other, padding=1), expected, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("weight_size", "groups"),
    [
        ((16, 8, 3, 3), 1),
        ((16, 8, 1, 1), 1),
        ((8, 1, 3, 3), 8),
        ((8, 1, 1, 1), 8),
        ((16, 8, 1, 3), 1),
    ],
    ids=str,
)
def test_a_weights_gradient_has_its_strides(weight_size, groups, memory_format):
    """Also where they say nothing about where a value lies: DistributedDataParallel compares them,
    and warns."""
    x = channels_last(2, 8, 6, 6)
    weight = torch.randn(weight_size).to(memory_format=memory_format)
    y, mean, var = ops.conv_stats(x, weight, groups=groups)
    channels = weight_size[0]
    norm = ops.Normalized(y, mean, var, torch.ones(channels), torch.zeros(channels), 1e-5, True)
    grad = torch.randn_like(y)
    sums, _ = ops.bn_sums(grad, None, y, mean)
    result = ops.conv_bn_backward(grad, None, sums, norm, x, weight, groups=groups)
    assert result.weight.stride() == weight.stride()


def test_a_larger_stride_is_left_to_the_twins():
    x, weight = channels_last(2, 8, 11, 11), torch.randn(8, 8, 3, 3)
    found = ops.conv_stats(x, weight, stride=5)
    for value, expected in zip(found, reference.conv_stats(x, weight, stride=5), strict=True):
        torch.testing.assert_close(value, expected)
    y, mean, var = found
    norm = ops.Normalized(y, mean, var, torch.ones(8), torch.zeros(8), 1e-5, True)
    grad = torch.randn_like(y)
    arguments = (grad, None, ops.bn_sums(grad, None, y, mean)[0], norm, x, weight)
    found = ops.conv_bn_backward(*arguments, stride=5)
    expected = reference.conv_bn_backward(*arguments, stride=5)
    torch.testing.assert_close(found.weight, expected.weight)
    torch.testing.assert_close(found.x, expected.x)


def test_bad_arguments_are_named():
    x = channels_last(2, 8, 6, 6, dtype=torch.float32)
    operator = torch.ops.fastresnet.conv_stats
    none = (None, None, None, None, 0.0)
    with pytest.raises(ValueError, match=r"expected weight of shape \[out_channels, 8"):
        operator(x, *none, torch.randn(4, 9, 1, 1), 1, 0, 1, 1)
    with pytest.raises(ValueError, match="expected a stride of 1 to 4, got 5"):
        operator(x, *none, torch.randn(4, 8, 1, 1), 5, 0, 1, 1)
    with pytest.raises(ValueError, match="at least the kernel's size"):
        operator(x, *none, torch.randn(4, 8, 7, 7), 1, 0, 1, 1)
    with pytest.raises(ValueError, match="expected groups that divide the 8 channels, got 3"):
        operator(x, *none, torch.randn(4, 8, 1, 1), 1, 0, 1, 3)
    with pytest.raises(ValueError, match="as many output as input channels"):
        operator(x, *none, torch.randn(4, 4, 1, 1), 1, 0, 1, 2)
    with pytest.raises(ValueError, match="all of x_mean, x_var, x_weight and x_bias, or none"):
        operator(x, torch.zeros(8), None, None, None, 0.0, torch.randn(4, 8, 1, 1), 1, 0, 1, 1)
    with pytest.raises(ValueError, match="expected weight of float32, bfloat16 or float16, got"):
        operator(x, *none, torch.randn(4, 8, 1, 1).double(), 1, 0, 1, 1)
    vectors = [torch.ones(8) for _ in range(4)]
    for index, name in enumerate(("x_mean", "x_var", "x_weight", "x_bias")):
        wrong = [torch.ones(7) if i == index else v for i, v in enumerate(vectors)]
        with pytest.raises(ValueError, match=f"expected {name} "):
            operator(x, *wrong, 1e-5, torch.randn(4, 8, 1, 1), 1, 0, 1, 1)


def test_bad_arguments_of_a_backward_are_named():
    x, y = (channels_last(2, channels, 6, 6, dtype=torch.float32) for channels in (8, 4))
    sums, vector = torch.zeros(2, 4, dtype=torch.float64), torch.ones(4)

    def call(y, sums):
        torch.ops.fastresnet.conv_bn_backward(
            *(torch.ones_like(y), None, sums, y, vector, vector, vector, 1e-5, True),
            *(x, None, None, None, None, 0.0, torch.randn(4, 8, 1, 1), None, None),
            *(1, 0, 1, 1, True),
        )

    call(y, sums)
    with pytest.raises(ValueError, match=r"y of shape \[2, 4, 6, 6\] in x's dtype Float, got "):
        call(y.bfloat16(), sums)
    with pytest.raises(ValueError, match=r"sums of float64 \[2, 4\], got \[2, 4\] of Float"):
        call(y, sums.float())
    strides = r"dense in channels_last, got shape \[2, 4, 6, 6\] with strides \[144, 36, 6, 1\]"
    with pytest.raises(ValueError, match=f"expected y to be {strides}"):
        call(y.contiguous(), sums)


def test_operators_pass_opcheck():
    x = channels_last(2, 8, 6, 6, dtype=torch.float32)
    bn = (torch.zeros(8), torch.ones(8), torch.ones(8), torch.zeros(8), 1e-5)
    weight = torch.randn(16, 8, 3, 3)
    torch.library.opcheck(torch.ops.fastresnet.conv_stats.default, (x, *bn, weight, 2, 1, 1, 1))
    y, mean, var = ops.conv_stats(x, weight, stride=2, padding=1)
    sums = (torch.ones_like(y), None, y, mean, None, None)
    torch.library.opcheck(torch.ops.fastresnet.bn_sums.default, sums)
    torch.library.opcheck(
        torch.ops.fastresnet.conv_bn_backward.default,
        (
            *(torch.ones_like(y), None, ops.bn_sums(*sums)[0], y, mean, var, torch.ones(16)),
            *(1e-5, True, x, *bn, weight, None, None, 2, 1, 1, 1, True),
        ),
    )


def nodes(out: Tensor) -> list[str]:
    names, waiting = [], [out.grad_fn]
    while waiting:
        node = waiting.pop()
        names.append(node.name())
        waiting.extend(parent for parent, _ in node.next_functions if parent is not None)
    return names


BLOCKS = {
    "basic": lambda: resnet.BasicBlock(32, 32),
    "basic_projection": lambda: resnet.BasicBlock(
        16, 32, 2, nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    ),
    "bottleneck": lambda: resnet.Bottleneck(64, 16),
    "bottleneck_projection": lambda: resnet.Bottleneck(
        32, 16, 2, nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
    ),
    "dilated": lambda: resnet.Bottleneck(64, 16, dilation=2),
    "resnext": lambda: resnet.Bottleneck(128, 32, groups=8, base_width=16),
}


def step(block: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = block(x)
    out.backward(grad.to(out.dtype))
    results = {"out": out, "x": x.grad}
    results |= {name: parameter.grad for name, parameter in block.named_parameters()}
    return results | {name: b for name, b in block.named_buffers() if "running" in name}


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_block(make, dtype, training, monkeypatch):
    torch.manual_seed(0)
    theirs = make().to(memory_format=torch.channels_last).train(training)
    for bn in theirs.modules():
        if isinstance(bn, nn.BatchNorm2d):
            # Away from the kink: a gradient that one rounding sends the other way is no error.
            nn.init.constant_(bn.bias, 1.0)
            nn.init.uniform_(bn.weight, 0.1, 0.3)
    ours = fastresnet.convert(copy.deepcopy(theirs))
    exact = copy.deepcopy(theirs).double()
    calls = []
    apply = residual._ResidualBlock.apply
    monkeypatch.setattr(
        residual._ResidualBlock, "apply", lambda *a: calls.append(1) or apply(*a), raising=True
    )
    x = channels_last(4, theirs.conv1.in_channels, 12, 10, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        shape = theirs.eval()(x).shape
        theirs.train(training)
        grad = torch.randn(shape).to(dtype)
        torchs = step(theirs, x, grad)
        got = step(ours, x, grad)
    assert calls == [1]
    wanted = step(exact, x.double(), grad)
    for name, value in wanted.items():
        assert got[name].dtype == torchs[name].dtype, name
        scale = value.abs().max().item()
        assert_no_worse(got[name], torchs[name], value, name, scale)


def test_a_model_runs_block_by_block_and_counts_its_batches():
    model = fastresnet.models.resnet18(num_classes=4).to(memory_format=torch.channels_last)
    x = channels_last(2, 3, 64, 64, dtype=torch.float32)
    out = model(x)
    out.sum().backward()
    assert "_ResidualBlockBackward" in nodes(out)
    assert model.layer1[0].bn1.num_batches_tracked == 1
    with torch.no_grad():
        assert torch.isfinite(model.eval()(x)).all()


def test_what_is_not_plain_runs_as_before():
    block = fastresnet.convert(resnet.BasicBlock(32, 32).to(memory_format=torch.channels_last))
    x = channels_last(2, 32, 8, 8, dtype=torch.float32).requires_grad_()
    assert block(x).grad_fn.name() == "_ResidualBlockBackward"
    seen = []
    handle = block.conv2.register_forward_hook(lambda *_: seen.append(1))
    assert block(x).grad_fn.name() != "_ResidualBlockBackward"
    assert seen == [1]
    handle.remove()
    uneven = resnet.Bottleneck(64, 16, groups=2, base_width=48).to(
        memory_format=torch.channels_last
    )
    wide = channels_last(2, 64, 8, 8, dtype=torch.float32).requires_grad_()
    assert fastresnet.convert(uneven)(wide).grad_fn.name() != "_ResidualBlockBackward"


def test_second_derivative_raises():
    block = fastresnet.convert(resnet.BasicBlock(32, 32).to(memory_format=torch.channels_last))
    x = channels_last(2, 32, 8, 8, dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
