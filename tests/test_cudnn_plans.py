# SPDX-License-Identifier: Apache-2.0
"""cuDNN is asked, without a GPU, for a plan of every convolution of every ResNet.

A plan is made for a device that is described to cuDNN; its engines compile their kernels then. That
proves that a graph is taken and compiles, not that it is right or fast: both are found out where it
is first used (fastresnet/ops/choice.py). What has no plan is listed here and runs as torch's
convolution and kernels of ours.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastresnet
from fastresnet import _extension

CSRC = Path(__file__).resolve().parent.parent / "csrc"
BATCH = 64
DTYPES = ["bfloat16", "float16"]
SMALL = {"cifar_resnet18": 32, "resnet18_truncated": 64}  # networks for images of that size

pytestmark = pytest.mark.skipif(
    _extension.cuda_missing is not None, reason=str(_extension.cuda_missing)
)

# In cuDNN's words. What is alike in all of them first.
COMMON = {
    "maxGridSize": [2147483647, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64],
    "regsPerBlock": 65536,
    "warpSize": 32,
    "maxSharedMemoryPerBlock": 49152,
    "reservedSharedMemoryPerBlock": 1024,
    "maxRegistersPerSM": 65536,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "maxCtasPerSM": 32,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
    "cudaDeviceId": 0,
    "driverVer": 13000,
    "smCountOrigin": 0,
}
DEVICES = {
    "sm_80": {
        "deviceVer": 800,
        "deviceName": "NVIDIA A100-SXM4-80GB",
        "multiProcessorCount": 108,
        "maxSharedMemoryPerBlockOptin": 166912,
        "totalGlobalMem": 85000000000,
        "smClockRateKHz": 1410000,
        "memClockRateKHz": 1593000,
        "l2CacheSize": 41943040,
    },
    "sm_90": {
        "deviceVer": 900,
        "deviceName": "NVIDIA H100 80GB HBM3",
        "multiProcessorCount": 132,
        "maxSharedMemoryPerBlockOptin": 232448,
        "totalGlobalMem": 85000000000,
        "smClockRateKHz": 1980000,
        "memClockRateKHz": 2619000,
        "l2CacheSize": 52428800,
    },
    "sm_100": {
        "deviceVer": 1000,
        "deviceName": "NVIDIA B200",
        "multiProcessorCount": 148,
        "maxSharedMemoryPerBlockOptin": 232448,
        "totalGlobalMem": 190000000000,
        "smClockRateKHz": 1965000,
        "memClockRateKHz": 3996000,
        "l2CacheSize": 132644864,
    },
}

# A driver without a device: cuDNN's engines that compile at run time look it up, and make nothing
# of its answers where the device is a described one.
DRIVER = """
int cuInit(unsigned flags) { (void)flags; return 100; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = 0; return 100; }
int cuGetErrorName(int error, const char** text) { (void)error; *text = "NO_DEVICE"; return 0; }
int cuGetErrorString(int error, const char** text) { (void)error; *text = "no device"; return 0; }
static int none(void) { return 100; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags,
                        int* found) {
  (void)name, (void)version, (void)flags;
  *function = (void*)none;
  if (found) *found = 0;
  return 0;
}
"""
NO_DEVICE = """
CtxGetCurrent CtxGetDevice CtxGetLimit CtxPopCurrent CtxPushCurrent DeviceGet DeviceGetAttribute
DevicePrimaryCtxRelease DevicePrimaryCtxReset DevicePrimaryCtxRetain FuncGetAttribute
FuncSetAttribute KernelGetAttribute KernelSetAttribute LaunchCooperativeKernel LaunchKernel
LaunchKernelEx LibraryGetKernel LibraryLoadData LibraryLoadFromFile LibraryUnload LinkAddData
LinkAddData_v2 LinkAddFile_v2 LinkComplete LinkCreate LinkCreate_v2 LinkDestroy MemcpyDtoH_v2
ModuleGetFunction ModuleGetGlobal_v2 ModuleLoadData ModuleLoadDataEx ModuleLoadFatBinary
ModuleUnload OccupancyMaxActiveBlocksPerMultiprocessor OccupancyMaxPotentialClusterSize
StreamGetCtx StreamSynchronize TensorMapEncodeTiled
"""
# Reads questions, one a line, and writes what becomes of each.
ASK = """
import json, sys, torch, fastresnet
for line in sys.stdin:
    *problem, dtype, device = json.loads(line)
    try:
        torch.ops.fastresnet.conv_engine(*problem, getattr(torch, dtype), json.dumps(device))
        print("plan", flush=True)
    except RuntimeError as error:
        print(str(error).splitlines()[0], flush=True)
"""

# A convolution or the gradient of its input with nothing beside it. The package leaves those to
# torch and has no operator for them, so its graphs are compiled into a library of this test's own.
PLAIN = """
#include <exception>
#include <string>
#include "cuda/cudnn_graph.h"
using namespace fastresnet::cudnn;
extern "C" const char* plain_plan(bool forward, bool bfloat16, const int64_t* x_size,
                                  const int64_t* weight_size, int64_t stride, int64_t padding,
                                  int64_t dilation, const char* device) {
  static std::string answer;
  try {
    const DataType type = bfloat16 ? DataType::bfloat16 : DataType::float16;
    Sizes sizes(x_size, x_size + 4), filter(weight_size, weight_size + 4);
    Graph graph;
    const Graph::TensorId x = graph.tensor(sizes, type), weight = graph.tensor(filter, type);
    sizes[1] = filter[0];
    for (int i : {2, 3})
      sizes[i] = (sizes[i] + 2 * padding - dilation * (filter[i] - 1) - 1) / stride + 1;
    const Graph::TensorId y = graph.tensor(sizes, type);
    if (forward)
      graph.convolution(x, weight, y, {stride, padding, dilation});
    else
      graph.convolution_backward_data(y, weight, x, {stride, padding, dilation});
    graph.plan({nullptr, device});
    answer = "plan";
  } catch (const std::exception& error) {
    answer = error.what();
  }
  return answer.c_str();
}
"""
ASK_PLAIN = """
import ctypes, json, sys, torch
plan = ctypes.CDLL("./plain.so").plain_plan
plan.restype = ctypes.c_char_p
for line in sys.stdin:
    graph, *sizes, stride, padding, dilation, _, dtype, device = json.loads(line)
    arrays = [(ctypes.c_int64 * 4)(*size) for size in sizes]
    numbers = map(ctypes.c_int64, (stride, padding, dilation))
    kind = (ctypes.c_bool(graph == "conv"), ctypes.c_bool(dtype == "bfloat16"))
    answer = plan(*kind, *arrays, *numbers, json.dumps(device).encode())
    print(answer.decode().splitlines()[0], flush=True)
"""


class Problem(NamedTuple):
    """A graph and the convolution in it, as the operator ``conv_engine`` takes them."""

    graph: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int
    padding: int
    dilation: int
    groups: int


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("driver")
    functions = [f"int cu{name}(void) {{ return 100; }}" for name in NO_DEVICE.split()]
    (folder / "driver.c").write_text(DRIVER + "\n".join(functions) + "\n")
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "driver.c"]
    subprocess.run([*command, "-o", "libcuda.so.1"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def plain(driver: Path) -> Path:
    """The driver's folder, with the library that ASK_PLAIN loads."""
    (driver / "plain.cpp").write_text(PLAIN)
    sources = [str(CSRC / "cuda" / name) for name in ("cudnn_graph.cpp", "cudnn_api.cpp")]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{CSRC}", "plain.cpp", *sources, "-ldl"]
    subprocess.run([*command, "-o", "plain.so"], cwd=driver, check=True)
    return driver


def ask(
    driver: Path, problems: list[Problem], dtype: str, architecture: str, script: str = ASK
) -> dict[Problem, str]:
    """Problem -> "plan", or why there is none."""
    device = COMMON | DEVICES[architecture]
    path = f"{driver}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(json.dumps([*problem, dtype, device]) for problem in problems),
        capture_output=True,
        text=True,
        env=os.environ | {"LD_LIBRARY_PATH": path},
        cwd=driver,  # not where a clone's fastresnet/ hides the installed one
        check=False,
    )
    answers = done.stdout.splitlines()
    assert len(answers) == len(problems), done.stderr
    return dict(zip(problems, answers, strict=True))


def problems_of(name: str, side: int = 224) -> Iterator[Problem]:
    """The graphs of one network's training step, images of side x side."""
    with torch.device("meta"):
        model = fastresnet.models.revert(getattr(fastresnet.models, name)())
        seen: dict[nn.Module, tuple[int, ...]] = {}
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda m, x: seen.update({m: tuple(x[0].shape)}))
        model(torch.empty(BATCH, 3, side, side))

    def problem(graph: str, conv: nn.Conv2d) -> Problem:
        sides = (conv.stride[0], conv.padding[0], conv.dilation[0])
        return Problem(graph, seen[conv], tuple(conv.weight.shape), *sides, conv.groups)

    for conv in seen:
        yield problem("conv_sums", conv)
    blocks = [block for i in range(1, 5) for block in getattr(model, f"layer{i}").children()]
    for before, block in zip([None, *blocks], blocks, strict=False):
        if before is None:
            yield problem("conv_dgrad_add", block.conv1)
        elif before.downsample is None:
            yield problem("bn_add_relu_conv_dgrad", block.conv1)
        else:
            yield problem("bn_add_bn_relu_conv_dgrad", block.conv1)
        for conv in (block.conv2, getattr(block, "conv3", None)):
            if conv is not None:
                yield problem("bn_relu_conv_dgrad", conv)


def is_missing(problem: Problem) -> bool:
    """What cuDNN 9.24 has no plan for: grouped convolutions, and gradients of strided ones, with
    anything behind them."""
    return problem.groups > 1 or (problem.stride > 1 and problem.graph != "conv_sums")


def check_plans(answers: dict[Problem, str]) -> None:
    without = {problem: answer for problem, answer in answers.items() if answer != "plan"}
    listed = {problem for problem in answers if is_missing(problem)}
    assert set(without) <= listed, f"no plan: { {p: without[p] for p in set(without) - listed} }"
    assert listed <= set(without), f"there are plans now: {listed - set(without)}"


@pytest.mark.parametrize("architecture", DEVICES)
def test_plans_of_a_few_shapes(driver: Path, architecture: str) -> None:
    """Every kind of graph on some device; that of the forward on all."""
    every = [p for p in problems_of("resnet50") if p.stride == 1]
    few = {p.graph: p for p in every}
    first, *others = few.values()
    assert len(few) == 5
    index = list(DEVICES).index(architecture)
    check_plans(ask(driver, [first, *others[index::3]], DTYPES[index % 2], architecture))


@functools.cache
def problems_of_every_network() -> list[Problem]:
    """Those of the ten ResNets that torchvision has."""
    names = [n for n in fastresnet.models.resnet.__all__ if n.startswith(("res", "wide"))]
    assert len(names) == 10
    return list(dict.fromkeys(p for name in names for p in problems_of(name)))


@functools.cache
def problems_of_small_images() -> list[Problem]:
    return list(dict.fromkeys(p for name, side in SMALL.items() for p in problems_of(name, side)))


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(
            *(architecture, dtype),
            marks=[] if (architecture, dtype) == ("sm_90", "bfloat16") else [pytest.mark.slow],
        )
        for architecture in DEVICES
        for dtype in DTYPES
    ],
)
def test_plans_of_every_plain_convolution(plain: Path, architecture: str, dtype: str) -> None:
    """What has no plan together with its neighbours has one by itself."""
    every = problems_of_every_network() + problems_of_small_images()
    convolutions = [p for p in every if p.graph == "conv_sums"]
    assert any(p.groups > 1 and p.stride > 1 for p in convolutions)
    problems = [p._replace(graph=graph) for graph in ("conv", "conv_dgrad") for p in convolutions]
    answers = ask(plain, problems, dtype, architecture, ASK_PLAIN)
    print(architecture, dtype, len(problems), "plain problems:", dict(Counter(answers.values())))
    without = {problem: answer for problem, answer in answers.items() if answer != "plan"}
    assert not without


def test_a_plain_plan_is_for_a_device(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_75 multiplies in float16 and not in bfloat16, and that is what cuDNN answers."""
    monkeypatch.setitem(DEVICES, "sm_75", DEVICES["sm_80"] | {"deviceVer": 750})
    graphs = ("conv", "conv_dgrad")
    problems = [Problem(graph, (2, 64, 8, 8), (64, 64, 3, 3), 1, 1, 1, 1) for graph in graphs]
    for dtype, expected in (("float16", "plan"), ("bfloat16", "cuDNN has no plan for this graph")):
        answers = ask(plain, problems, dtype, "sm_75", ASK_PLAIN)
        assert all(answer.startswith(expected) for answer in answers.values()), answers


def test_how_many_have_no_plan() -> None:
    """The numbers in docs/cuda.md: of what the tests below hold against cuDNN's answers."""
    small = problems_of_small_images()
    assert (len(small), sum(map(is_missing, small))) == (34, 4)
    problems = problems_of_every_network()
    missing = [(p.graph, p.groups > 1) for p in problems if is_missing(p)]
    assert (len(problems), len(missing)) == (158, 51)
    assert Counter(missing) == {
        ("conv_sums", True): 21,
        ("bn_relu_conv_dgrad", True): 21,
        ("bn_relu_conv_dgrad", False): 6,
        ("bn_add_relu_conv_dgrad", False): 3,
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", DEVICES)
def test_plans_of_every_convolution(driver: Path, architecture: str, dtype: str) -> None:
    problems = problems_of_every_network()
    answers = ask(driver, problems, dtype, architecture)
    counts = Counter((p.graph, answer == "plan") for p, answer in answers.items())
    print(architecture, dtype, len(problems), "problems:", dict(counts))
    check_plans(answers)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", DEVICES)
def test_plans_for_small_images(driver: Path, architecture: str, dtype: str) -> None:
    check_plans(ask(driver, problems_of_small_images(), dtype, architecture))


def test_what_cannot_be_asked_is_refused() -> None:
    problem = ("conv_sums", [2, 8, 4, 4], [8, 8, 1, 1], 1, 0, 1, 1, torch.bfloat16)
    with pytest.raises(RuntimeError, match="cuDNN"):
        torch.ops.fastresnet.conv_engine(*problem, "{}")
    with pytest.raises(ValueError, match="expected the name of a graph, got conv"):
        torch.ops.fastresnet.conv_engine("conv", *problem[1:], "{}")
    with pytest.raises(RuntimeError, match="no plan for channels that do not come in eights: 12"):
        torch.ops.fastresnet.conv_engine(*problem[:2], [12, 8, 1, 1], *problem[3:], "{}")
    with pytest.raises(ValueError, match="expected weight for 8 channels in 2 groups"):
        torch.ops.fastresnet.conv_engine(*problem[:6], 2, torch.bfloat16, "{}")


def test_the_version_is_torchs() -> None:
    assert torch.ops.fastresnet.cudnn_version() == torch.backends.cudnn.version()


def test_our_numbers_are_cudnns(tmp_path: Path) -> None:
    """cuDNN's header, where it is there, says the same of every constant that we declare."""
    headers = Path(torch.__file__).parents[1] / "nvidia" / "cudnn" / "include"
    toolkit = Path("/usr/local/cuda/include")
    if not (headers / "cudnn_graph.h").exists() or not (toolkit / "cuda_runtime.h").exists():
        pytest.skip("no header of cuDNN or of CUDA")
    pairs = {
        "kPointwise": "BACKEND_POINTWISE_DESCRIPTOR",
        "kConvolution": "BACKEND_CONVOLUTION_DESCRIPTOR",
        "kEngineHeuristics": "BACKEND_ENGINEHEUR_DESCRIPTOR",
        "kEngineConfig": "BACKEND_ENGINECFG_DESCRIPTOR",
        "kExecutionPlan": "BACKEND_EXECUTION_PLAN_DESCRIPTOR",
        "kConvolutionForward": "BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR",
        "kConvolutionBackwardData": "BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR",
        "kPointwiseOperation": "BACKEND_OPERATION_POINTWISE_DESCRIPTOR",
        "kOperationGraph": "BACKEND_OPERATIONGRAPH_DESCRIPTOR",
        "kVariantPack": "BACKEND_VARIANT_PACK_DESCRIPTOR",
        "kTensor": "BACKEND_TENSOR_DESCRIPTOR",
        "kReduction": "BACKEND_REDUCTION_DESCRIPTOR",
        "kReductionOperation": "BACKEND_OPERATION_REDUCTION_DESCRIPTOR",
        "kDeviceProperties": "BACKEND_DEVICEPROP_DESCRIPTOR",
        "kTypeHandle": "TYPE_HANDLE",
        "kTypeDataType": "TYPE_DATA_TYPE",
        "kTypeBoolean": "TYPE_BOOLEAN",
        "kTypeInt64": "TYPE_INT64",
        "kTypeFloat": "TYPE_FLOAT",
        "kTypeVoidPointer": "TYPE_VOID_PTR",
        "kTypeConvolutionMode": "TYPE_CONVOLUTION_MODE",
        "kTypeHeuristicsMode": "TYPE_HEUR_MODE",
        "kTypePointwiseMode": "TYPE_POINTWISE_MODE",
        "kTypeDescriptor": "TYPE_BACKEND_DESCRIPTOR",
        "kTypeReductionOperator": "TYPE_REDUCTION_OPERATOR_TYPE",
        "kTypeChar": "TYPE_CHAR",
        "kPointwiseModeOf": "ATTR_POINTWISE_MODE",
        "kPointwisePrecision": "ATTR_POINTWISE_MATH_PREC",
        "kConvolutionPrecision": "ATTR_CONVOLUTION_COMP_TYPE",
        "kConvolutionModeOf": "ATTR_CONVOLUTION_CONV_MODE",
        "kConvolutionDilations": "ATTR_CONVOLUTION_DILATIONS",
        "kConvolutionStrides": "ATTR_CONVOLUTION_FILTER_STRIDES",
        "kConvolutionPostPaddings": "ATTR_CONVOLUTION_POST_PADDINGS",
        "kConvolutionPrePaddings": "ATTR_CONVOLUTION_PRE_PADDINGS",
        "kConvolutionSpatialDimensions": "ATTR_CONVOLUTION_SPATIAL_DIMS",
        "kHeuristicsModeOf": "ATTR_ENGINEHEUR_MODE",
        "kHeuristicsGraph": "ATTR_ENGINEHEUR_OPERATION_GRAPH",
        "kHeuristicsResults": "ATTR_ENGINEHEUR_RESULTS",
        "kHeuristicsDevice": "ATTR_ENGINEHEUR_DEVICEPROP",
        "kPlanHandle": "ATTR_EXECUTION_PLAN_HANDLE",
        "kPlanEngineConfig": "ATTR_EXECUTION_PLAN_ENGINE_CONFIG",
        "kPlanWorkspaceSize": "ATTR_EXECUTION_PLAN_WORKSPACE_SIZE",
        "kPlanJson": "ATTR_EXECUTION_PLAN_JSON_REPRESENTATION",
        "kPlanDevice": "ATTR_EXECUTION_PLAN_DEVICEPROP",
        "kForwardAlpha": "ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA",
        "kForwardBeta": "ATTR_OPERATION_CONVOLUTION_FORWARD_BETA",
        "kForwardConvolution": "ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC",
        "kForwardW": "ATTR_OPERATION_CONVOLUTION_FORWARD_W",
        "kForwardX": "ATTR_OPERATION_CONVOLUTION_FORWARD_X",
        "kForwardY": "ATTR_OPERATION_CONVOLUTION_FORWARD_Y",
        "kBackwardDataAlpha": "ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA",
        "kBackwardDataBeta": "ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA",
        "kBackwardDataConvolution": "ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC",
        "kBackwardDataW": "ATTR_OPERATION_CONVOLUTION_BWD_DATA_W",
        "kBackwardDataDx": "ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX",
        "kBackwardDataDy": "ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY",
        "kPointwiseDescriptor": "ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR",
        "kPointwiseX": "ATTR_OPERATION_POINTWISE_XDESC",
        "kPointwiseB": "ATTR_OPERATION_POINTWISE_BDESC",
        "kPointwiseY": "ATTR_OPERATION_POINTWISE_YDESC",
        "kPointwiseDx": "ATTR_OPERATION_POINTWISE_DXDESC",
        "kPointwiseDy": "ATTR_OPERATION_POINTWISE_DYDESC",
        "kGraphHandle": "ATTR_OPERATIONGRAPH_HANDLE",
        "kGraphOperations": "ATTR_OPERATIONGRAPH_OPS",
        "kTensorAlignment": "ATTR_TENSOR_BYTE_ALIGNMENT",
        "kTensorDataType": "ATTR_TENSOR_DATA_TYPE",
        "kTensorDimensions": "ATTR_TENSOR_DIMENSIONS",
        "kTensorStrides": "ATTR_TENSOR_STRIDES",
        "kTensorUniqueId": "ATTR_TENSOR_UNIQUE_ID",
        "kTensorIsVirtual": "ATTR_TENSOR_IS_VIRTUAL",
        "kPackUniqueIds": "ATTR_VARIANT_PACK_UNIQUE_IDS",
        "kPackPointers": "ATTR_VARIANT_PACK_DATA_POINTERS",
        "kPackWorkspace": "ATTR_VARIANT_PACK_WORKSPACE",
        "kReductionOperatorOf": "ATTR_REDUCTION_OPERATOR",
        "kReductionPrecision": "ATTR_REDUCTION_COMP_TYPE",
        "kReductionX": "ATTR_OPERATION_REDUCTION_XDESC",
        "kReductionY": "ATTR_OPERATION_REDUCTION_YDESC",
        "kReductionDescriptor": "ATTR_OPERATION_REDUCTION_DESC",
        "kDeviceJson": "ATTR_DEVICEPROP_JSON_REPRESENTATION",
        "DataType::float32": "DATA_FLOAT",
        "DataType::float16": "DATA_HALF",
        "DataType::bfloat16": "DATA_BFLOAT16",
        "DataType::bit": "DATA_BOOLEAN",
        "Pointwise::add": "POINTWISE_ADD",
        "Pointwise::mul": "POINTWISE_MUL",
        "Pointwise::sub": "POINTWISE_SUB",
        "Pointwise::relu_backward": "POINTWISE_RELU_BWD",
        "Heuristics::fallback": "HEUR_MODE_FALLBACK",
        "Heuristics::by_model": "HEUR_MODE_A",
        "kSum": "REDUCE_TENSOR_ADD",
        "kCrossCorrelation": "CROSS_CORRELATION",
    }
    declared = (CSRC / "cuda" / "cudnn_api.h").read_text()
    names = re.findall(r"^  (k\w+) = ", declared, re.MULTILINE)
    assert set(names) <= set(pairs), set(names) - set(pairs)
    asserts = [f"static_assert(int({ours}) == int(CUDNN_{its}));" for ours, its in pairs.items()]
    source = tmp_path / "numbers.cpp"
    source.write_text(
        '#include <cudnn_graph.h>\n#include "cuda/cudnn_api.h"\n'
        "using namespace fastresnet::cudnn;\n" + "\n".join(asserts) + "\n"
    )
    flags = ["-std=c++20", "-fsyntax-only", "-w", f"-I{CSRC}", f"-I{headers}", f"-I{toolkit}"]
    done = subprocess.run(["g++", *flags, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
