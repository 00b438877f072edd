# SPDX-License-Identifier: Apache-2.0
"""The convolutions whose neighbours cuDNN computes with them, without a GPU: csrc/cuda/conv.cpp and
its graphs as they are, on CPU tensors, with a stand-in for cuDNN that interprets the graphs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulator.convolutions import Convolutions, Cudnn, Mistake, build
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tolerances import assert_no_worse
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastresnet.ops import Geometry, reference

DTYPES = [torch.bfloat16, torch.float16]
GRAPHS = {  # and the operator that has it
    "conv_sums": "conv_sums",
    "conv_dgrad_add": "conv_dgrad_add",
    "bn_relu_conv_dgrad": "bn_relu_conv_dgrad",
    "bn_add_relu_conv_dgrad": "bn_add_relu_conv_dgrad",
    "bn_add_bn_relu_conv_dgrad": "bn_add_relu_conv_dgrad",
}

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
)


class Problem(NamedTuple):
    """The sizes of a convolution."""

    batch: int
    channels: int
    out_channels: int
    sides: tuple[int, int]
    kernel: tuple[int, int]
    geometry: Geometry

    @property
    def out_sides(self) -> list[int]:
        stride, padding, dilation, _ = self.geometry
        pairs = zip(self.sides, self.kernel, strict=True)
        return [(side + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for side, k in pairs]

    def tensors(self, graph: str, dtype: torch.dtype) -> list[Tensor | None]:
        """Random arguments of the graph's operator, but for the geometry."""

        def channels_last(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)

        x_shape = (self.batch, self.channels, *self.sides)
        weight = channels_last(
            self.out_channels, self.channels // self.geometry.groups, *self.kernel
        )
        if graph == "conv_sums":
            return [channels_last(*x_shape), weight]
        grad = channels_last(self.batch, self.out_channels, *self.out_sides)
        x, addend, residual = (channels_last(*x_shape) for _ in range(3))
        mean, scale, bias = (torch.randn(self.channels) for _ in range(3))
        mask_shape = (self.batch, *self.sides, self.channels // 8)
        mask = torch.randint(0, 256, mask_shape, dtype=torch.uint8)
        return {
            "conv_dgrad_add": [grad, weight, addend],
            "bn_relu_conv_dgrad": [grad, weight, x, mean, scale, bias],
            "bn_add_relu_conv_dgrad": [grad, weight, addend, mask, x, mean, None, None],
            "bn_add_bn_relu_conv_dgrad": [grad, weight, addend, mask, x, mean, residual, scale],
        }[graph]


ONE = Problem(2, 16, 24, (5, 8), (3, 3), Geometry(2, 2, 1, 2))


@st.composite
def problems(draw: Callable, graph: str) -> Problem:
    groups = draw(st.sampled_from([1, 1, 2]))
    # In eights come the channels of what the graph sums up.
    sizes = [groups * draw(st.integers(1, 9)), 8 * draw(st.integers(1, 3))]
    problem = Problem(
        draw(st.integers(1, 3)),
        *(sizes if graph == "conv_sums" else sizes[::-1]),
        draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        draw(st.sampled_from([(1, 1), (3, 3), (7, 7), (1, 3)])),
        Geometry(draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 2)), groups),
    )
    assume(min(problem.out_sides) > 0)
    return problem


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("emulator"))


@pytest.fixture(scope="module")
def cudnn(cache: Path) -> Cudnn:
    return Cudnn(cache)


@pytest.fixture(scope="module")
def load(cache: Path, cudnn: Cudnn) -> Callable[..., Convolutions]:
    """Loads what has no mistake, to be registered in the namespace that it is given."""
    return lambda name, found=cudnn.file: Convolutions(build(cache, name), name, found)


@pytest.fixture(scope="module")
def convolutions(load: Callable[..., Convolutions]) -> Convolutions:
    return load("stand_in")


class InDouble(TorchFunctionMode):
    """The twins convert to float32 what is to be summed up; here that is float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = Tensor.double if function is Tensor.float else function
        return function(*args, **(kwargs or {}))


def outputs(found: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return (found, None) if isinstance(found, Tensor) else found


def check(
    convolutions: Convolutions,
    graph: str,
    problem: Problem,
    dtype: torch.dtype,
    of_stored: bool = False,
) -> None:
    """The operator's results are those of its twin in float64, rounded: they are computed in that
    too. ``of_stored``: the sums are of what is stored."""
    tensors = problem.tensors(graph, dtype)
    operator = getattr(convolutions.operators, GRAPHS[graph])
    torch.use_deterministic_algorithms(True)  # so that new memory holds NaN until it is written
    try:
        found, sums = outputs(operator(*tensors, *problem.geometry))
    finally:
        torch.use_deterministic_algorithms(False)

    doubles = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    with InDouble():
        twin = getattr(reference, GRAPHS[graph])
        exact, exact_sums = outputs(twin(*doubles, *problem.geometry))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, exact.float().to(dtype)), "another output"
    if sums is None:
        return
    if of_stored:
        exact_sums = sums_of(graph, found.double(), doubles)
    for row, exact_row in zip(sums, exact_sums, strict=True):
        scale = exact_row.abs().max().item()
        assert_no_worse(row, exact_row.float(), exact_row, "sums", scale)


def sums_of(graph: str, values: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    """The sums that a graph comes to where its output is ``values``."""
    if graph == "conv_sums":
        no_mean = torch.zeros(values.shape[1])
        return list(reference.bn_sums(values, None, values, no_mean)[0])
    x, mean = tensors[2:4] if graph == "bn_relu_conv_dgrad" else tensors[4:6]
    other = tensors[6:8] if graph == "bn_add_bn_relu_conv_dgrad" else (None, None)
    sums, other_sums = reference.bn_sums(values, None, x, mean, *other)
    return [*sums] if other_sums is None else [*sums, other_sums[1]]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_means_what_its_twin_does(
    convolutions: Convolutions, cudnn: Cudnn, dtype: torch.dtype, graph: str
) -> None:
    @settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
    @given(problem=problems(graph), of_stored=st.booleans(), workspace=st.sampled_from([0, 1000]))
    @example(problem=ONE, of_stored=True, workspace=1000)
    def run(problem: Problem, of_stored: bool, workspace: int) -> None:
        with cudnn.set(reads_as_stored=of_stored, workspace_bytes=workspace):
            check(convolutions, graph, problem, dtype, of_stored)

    run()


def test_work_is_queued_on_torchs_stream(convolutions: Convolutions, cudnn: Cudnn) -> None:
    for stream in (0x10, 0x20):
        convolutions.use_stream(stream)
        check(convolutions, "conv_sums", ONE, torch.bfloat16)
        assert convolutions.memset_stream == cudnn.stream == stream


def test_a_plan_is_kept_for_every_thread(convolutions: Convolutions, cudnn: Cudnn) -> None:
    arguments = (convolutions, "conv_sums", ONE, torch.bfloat16)
    check(*arguments)
    before = cudnn.descriptors
    check(*arguments)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check, *arguments).result()
    assert cudnn.descriptors == before


# ---- What cuDNN may lack.


ENGINE = ([2, 16, 5, 8], [24, 16, 3, 3], 1, 1, 1, 1, torch.bfloat16, "{}")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"no cuDNN 9 \(libcudnn.so.9\) is found"),
        (90700, "cuDNN 90700 is found, and 9.8 or newer is needed"),
        (90800, "cuDNN has no cudnnGetErrorString"),
    ],
)
def test_another_library(
    load: Callable[..., Convolutions],
    cudnn: Cudnn,
    tmp_path: Path,
    version: int | None,
    message: str,
) -> None:
    library = tmp_path / "libcudnn.so.9"
    if version is not None:
        source = f"unsigned long cudnnGetVersion() {{ return {version}; }}"
        command = ["g++", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=source, text=True, check=True)
    convolutions = load(f"stand_in_for_{version}", library)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            convolutions.operators.conv_engine("conv_sums", *ENGINE)
    convolutions.find(cudnn.file)
    assert convolutions.operators.cudnn_version() == 90800


@pytest.mark.parametrize(
    ("engine", "limits"),
    [
        (0, {}),
        (1, {"refused_engines": 0b001}),
        (2, {"refused_engines": 0b011}),
        (2, {"silent_heuristics": 0b1000}),
    ],
)
def test_the_first_plan_that_can_be_made_is_taken(
    convolutions: Convolutions, cudnn: Cudnn, engine: int, limits: dict[str, int]
) -> None:
    for graph in GRAPHS:
        with cudnn.set(**limits):
            found = convolutions.operators.conv_engine(graph, *ENGINE)
        assert found == f'{{"engine": {engine}}}'


def test_descriptors_are_given_back(convolutions: Convolutions, cudnn: Cudnn) -> None:
    before = cudnn.descriptors
    convolutions.operators.conv_engine("conv_sums", *ENGINE)
    with cudnn.set(refused_engines=0b111), pytest.raises(RuntimeError):
        convolutions.operators.conv_engine("conv_sums", *ENGINE)
    assert cudnn.descriptors == before


def test_failures_are_told_in_cudnns_words(convolutions: Convolutions, cudnn: Cudnn) -> None:
    problem = ONE._replace(batch=4)  # of which there is no plan yet

    def refused(message: str, **limits: int) -> None:
        with cudnn.set(**limits), pytest.raises(RuntimeError, match=message):
            check(convolutions, "conv_sums", problem, torch.bfloat16)

    refused(
        r"^cuDNN has no plan for this graph: cuDNN: a plan: "
        r"CUDNN_STATUS_NOT_SUPPORTED \(engine 2 makes no plan\)",
        refused_engines=0b111,
    )
    refused(
        "^cuDNN has no plan for this graph: its heuristics propose none", silent_heuristics=0b1100
    )
    check(convolutions, "conv_sums", problem, torch.bfloat16)  # asked again
    refused(
        r"^cuDNN: a plan's execution: CUDNN_STATUS_EXECUTION_FAILED \(a kernel that fails\)",
        fails_to_execute=1,
    )


# ---- What the operators refuse.


def rows_first(t: Tensor) -> Tensor:
    return t.contiguous()


def misaligned(t: Tensor) -> Tensor:
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    return room[1:].as_strided(t.shape, t.stride()).copy_(t)


def less(t: Tensor) -> Tensor:
    """Without the last of its first dimension."""
    return t[:-1]


REFUSED = {
    "x, rows first": ("conv_sums", 0, rows_first, "expected x to be dense in channels_last"),
    "x, misaligned": ("conv_sums", 0, misaligned, "expected tensors at addresses of whole 16"),
    "x of bytes": ("conv_sums", 0, Tensor.byte, "expected x of float32, bfloat16 or float16"),
    "weight, rows first": ("conv_sums", 1, rows_first, "expected weight to be dense in channels"),
    "weight in float32": ("conv_sums", 1, Tensor.float, "expected weight of x's dtype"),
    "weight of 23": ("conv_sums", 1, less, "expected weight for 16 channels in 2 groups"),
    "grad of another batch": ("conv_dgrad_add", 0, less, "expected grad of the convolution's"),
    "grad, rows first": (
        "conv_dgrad_add",
        0,
        rows_first,
        "expected grad to be dense in channels_last",
    ),
    "mean of 15": ("bn_relu_conv_dgrad", 3, less, "expected mean of 16 values"),
    "bias in float64": ("bn_relu_conv_dgrad", 5, Tensor.double, "expected bias of float32"),
    "addend in float32": ("bn_add_relu_conv_dgrad", 2, Tensor.float, "expected addend of x's"),
    "mask of another batch": ("bn_add_relu_conv_dgrad", 3, less, "expected the mask"),
    "residual alone": ("bn_add_bn_relu_conv_dgrad", 7, lambda _: None, "and residual_mean, or"),
    "residual of another batch": ("bn_add_bn_relu_conv_dgrad", 6, less, "expected residual of x's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(convolutions: Convolutions, name: str) -> None:
    graph, position, change, message = REFUSED[name]
    tensors = ONE.tensors(graph, torch.bfloat16)
    tensors[position] = change(tensors[position])
    with pytest.raises((ValueError, RuntimeError), match=message):
        getattr(convolutions.operators, GRAPHS[graph])(*tensors, *ONE.geometry)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (Geometry(0, 1, 1, 1), "expected a stride, dilation and groups of 1 or more"),
        (Geometry(1, 1, 1, 2), "expected weight for 16 channels in 2 groups"),
        (Geometry(1, 0, 9, 1), "expected x of at least the kernel's size"),
    ],
)
def test_refused_geometry(convolutions: Convolutions, geometry: Geometry, message: str) -> None:
    tensors = ONE._replace(geometry=Geometry()).tensors("conv_sums", torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        convolutions.operators.conv_sums(*tensors, *geometry)


@pytest.mark.parametrize("graph", ["conv_sums", "bn_relu_conv_dgrad"])
def test_refused_channels(convolutions: Convolutions, graph: str) -> None:
    problem = ONE._replace(**{"out_channels" if graph == "conv_sums" else "channels": 12})
    with pytest.raises(RuntimeError, match="no plan for channels that do not come in eights: 12"):
        check(convolutions, graph, problem, torch.bfloat16)


# ---- Mistakes that must be noticed.

GRAPH, RELU, JOIN = "conv_sums", "bn_relu_conv_dgrad", "bn_add_bn_relu_conv_dgrad"
OUTPUT, SUMS = "another output", "sums: error"


class Planted(NamedTuple):
    """A mistake, the graph that it is in, and what comes of it."""

    graph: str
    message: str
    mistake: Mistake


def in_graphs(graph: str, message: str, right: str, wrong: str) -> Planted:
    """In what a graph is made of."""
    return Planted(graph, message, Mistake("conv_graphs.cpp", right, wrong))


def in_words(graph: str, message: str, right: str, wrong: str) -> Planted:
    """In how cuDNN is told of it."""
    return Planted(graph, message, Mistake("cudnn_graph.cpp", right, wrong))


def in_operators(graph: str, message: str, right: str, wrong: str) -> Planted:
    """In what it is handed."""
    return Planted(graph, message, Mistake("conv.cpp", right, wrong))


MISTAKES = {
    "y_doubled": in_graphs(GRAPH, SUMS, "mul, y, y", "add, y, y"),
    "mean_added": in_graphs(RELU, OUTPUT, "sub, x", "add, x"),
    "relu_of_the_gradient": in_graphs(RELU, OUTPUT, "(product, z, dz)", "(z, product, dz)"),
    "sum_in_front_of_the_relu": in_graphs(RELU, SUMS, "graph_.sum(dz", "graph_.sum(product"),
    "addend_forgotten": in_graphs(JOIN, OUTPUT, "whole, mask", "product, mask"),
    "third_sum_of_x": in_graphs(JOIN, SUMS, "(dz, residual)", "(dz, centred)"),
    "no_third_sum": in_graphs(JOIN, "number of pointers", "if (dual) sum", "if (false) sum"),
    "no_stride": in_graphs(RELU, "to other sizes than", "{p_.stride", "{1"),
    "rounded_in_between": in_graphs(
        "conv_dgrad_add", OUTPUT, "graph_.between(x_)", "graph_.tensor(x_, type_, true)"
    ),
    "rows_first": in_words(RELU, OUTPUT, "1, row, channels}", "sizes[2] * sizes[3], sizes[3], 1}"),
    "dilated_by_the_padding": in_words(
        RELU, "to other sizes than", "{geometry.dilation,", "{geometry.padding,"
    ),
    "sums_in_16_bits": in_words(
        GRAPH, "not stored in float32", "1, 1}, DataType::float32", "1, 1}, DataType::bfloat16"
    ),
    "one_id": in_words(GRAPH, "two tensors have the id 0", "UniqueId, id", "UniqueId, 0"),
    "no_beta": in_words(GRAPH, "no beta", "o.set(kForwardBeta, kTypeFloat, 1, &beta);", ""),
    "three_strides": in_words(GRAPH, "strides of 3 values", "1, row, channels}", "1, row}"),
    "workspace_as_a_number": in_words(
        GRAPH, "workspace of type 3", "Workspace, kTypeVoidPointer", "Workspace, kTypeInt64"
    ),
    "tensors_not_finalized": in_words(GRAPH, "is not finalized", 't.finalize("a tensor");', ""),
    "alignment_of_a_page": in_words(
        GRAPH, "whole 4096 bytes", "kAlignment = 16", "kAlignment = 4096"
    ),
    "first_operation_forgotten": in_words(
        RELU,
        "no operation produces the virtual tensor",
        "  Descriptor graph(",
        "  operations.erase(operations.begin());\n  Descriptor graph(",
    ),
    "sums_not_zeroed": in_operators(RELU, SUMS, "sizeof(float) * count", "0 * count"),
    "bias_for_scale": in_operators(RELU, OUTPUT, "scale, bias, dz", "bias, scale, dz"),
    "half_a_workspace": in_operators(
        RELU, "a workspace of less than 1000 bytes", "workspace_bytes()}", "workspace_bytes() / 2}"
    ),
}


@pytest.fixture(scope="module")
def libraries(cache: Path, convolutions: Convolutions) -> dict[str, Path]:
    """One with each mistake. What has none is compiled by now."""

    def with_mistake(name: str) -> Path:
        return build(cache, f"stand_in_with_{name}", MISTAKES[name].mistake)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(MISTAKES, pool.map(with_mistake, MISTAKES), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_noticed(libraries: dict[str, Path], cudnn: Cudnn, name: str) -> None:
    convolutions = Convolutions(libraries[name], f"stand_in_with_{name}", cudnn.file)
    graph, message, _ = MISTAKES[name]
    noticed = pytest.raises((AssertionError, RuntimeError), match=message)
    with cudnn.set(workspace_bytes=1000), noticed:
        check(convolutions, graph, ONE, torch.bfloat16)


def test_a_cudnn_that_reads_masks_otherwise_is_noticed(
    convolutions: Convolutions, cudnn: Cudnn
) -> None:
    mistaken = cudnn.set(reads_bits_from_the_highest=1)
    with mistaken, pytest.raises(AssertionError, match=OUTPUT):
        check(convolutions, JOIN, ONE, torch.bfloat16)
