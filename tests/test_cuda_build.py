# SPDX-License-Identifier: Apache-2.0
"""The built CUDA library, looked at without a GPU: registered operators and machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fastresnet import _extension

FORMS = ["bn", "bn_relu", "bn_add_relu", "bn_add_bn_relu"]
FORKS = ["bn_add_relu_fork_backward", "bn_add_bn_relu_fork_backward"]
OF_SUMS = ["bn_stats_of_sums", "bn_scale", "bn_backward_of_sums", "bn_add_bn_backward_of_sums"]
GRAPHS = ["conv_sums", "conv_dgrad_add", "bn_relu_conv_dgrad", "bn_add_relu_conv_dgrad"]
POOLED = ["bn_relu_max_pool", "bn_relu_max_pool_backward"]
POOLED += ["global_avg_pool", "global_avg_pool_backward"]
OPERATORS = ["bn_stats", *FORMS, *(f"{form}_backward" for form in FORMS), *FORKS, *POOLED]
OPERATORS += [*OF_SUMS, *GRAPHS]
KERNELS = {  # how many forms of each; every form in three dtypes, packed and not
    "bn_stats_kernel": 2,  # one of them from sums
    "bn_forward_kernel": 4,
    "bn_backward_reduce_kernel": 6,  # two of them with a second gradient
    "bn_backward_kernel": 3,  # that of add_relu is that of none
    "bn_relu_max_pool_kernel": 1,
    "max_pool_backward_reduce_kernel": 1,
    "max_pool_backward_kernel": 1,
    "global_avg_pool_kernel": 1,
    "global_avg_pool_backward_kernel": 1,
}
PLAIN = ["bn_scale_kernel"]  # on vectors only, one form
# Threads that share nothing.
WITHOUT_BARRIERS = [*PLAIN, "global_avg_pool_kernel", "global_avg_pool_backward_kernel"]
# Beyond 128, a multiprocessor holds fewer than 512 threads. The others have grown to what they
# need, and a compiler or a change that takes much more is worth a look.
MOST_REGISTERS = {
    # 80 alone; 84 on sm_120 for float32 where sums are looked at first. Below 65 two blocks would
    # be resident, up to 128 one is.
    "bn_stats_kernel": 84,
    "bn_scale_kernel": 32,
    "bn_forward_kernel": 96,
    "bn_backward_reduce_kernel": 128,
    "bn_backward_kernel": 128,
    "bn_relu_max_pool_kernel": 80,
    "max_pool_backward_reduce_kernel": 120,
    "max_pool_backward_kernel": 124,
    "global_avg_pool_kernel": 116,  # four pixels' loads in flight; images fill no more threads
    "global_avg_pool_backward_kernel": 40,
}
ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
CSRC = Path(__file__).resolve().parent.parent / "csrc"
# Everything that the entries launch, without torch's headers.
LAUNCHES = """
#include "cuda/avg_pool.cuh"
#include "cuda/bn_act.cuh"
#include "cuda/max_pool.cuh"
using namespace fastresnet::cuda;
void launch_all(const StatsParams& s, const ScaleParams& c, const ForwardParams& f,
                const BackwardParams& b, const PoolForwardParams& pf,
                const PoolBackwardParams& pb, const AvgPoolParams& af,
                const AvgPoolBackwardParams& ab, void* w, Queue q) {
  launch_bn_stats(s, w, q);
  launch_bn_scale(c, q);
  launch_bn_forward(f, q);
  launch_bn_backward(b, w, q);
  launch_max_pool_forward(pf, q);
  launch_max_pool_backward(pb, w, q);
  launch_global_avg_pool(af, q);
  launch_global_avg_pool_backward(ab, q);
}
"""

pytestmark = pytest.mark.skipif(
    _extension.cuda_missing is not None, reason=str(_extension.cuda_missing)
)


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    packed: bool
    registers: int
    stack: int
    local: int
    instructions: Counter = field(default_factory=Counter)


def library() -> Path:
    major = torch.version.cuda.split(".")[0]
    return Path(importlib.util.find_spec(f"fastresnet._C_cuda{major}").origin)


@pytest.fixture(scope="module")
def cuobjdump() -> Path:
    triton = importlib.util.find_spec("triton")
    shipped = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    tool = shipped if shipped and shipped.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump: neither in triton's wheel nor on PATH")
    return Path(tool)


def read_machine_code(cuobjdump: Path, file: Path) -> dict[str, dict[str, Kernel]]:
    """Architecture -> mangled name -> kernel."""
    # cuobjdump finds nvdisasm, which lies beside it, on PATH only.
    environment = os.environ | {"PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"}

    def dump(what: str) -> list[str]:
        command = [str(cuobjdump), what, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return (done.stdout + done.stderr).splitlines()

    code: dict[str, dict[str, Kernel]] = {}
    architecture = function = ""
    for line in dump("-res-usage"):
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\S+):", line):
            function = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            name = re.search(r"\d((?:bn|max_pool|global)_\w+?_kernel)", function)[1]
            packed = name not in PLAIN and re.findall(r"Lb([01])E", function)[-1] == "1"
            kernel = Kernel(name, packed, *map(int, found.groups()))
            code.setdefault(architecture, {})[function] = kernel
    for line in dump("-sass"):
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            function = found[1]
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            code[architecture][function].instructions[found[1]] += 1
    return code


@pytest.fixture(scope="module")
def machine_code(cuobjdump: Path) -> dict[str, dict[str, Kernel]]:
    """That of the library which is built."""
    return read_machine_code(cuobjdump, library())


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_is_registered_without_a_gpu(operator: str) -> None:
    name = f"fastresnet::{operator}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def test_architectures(machine_code: dict[str, dict[str, Kernel]]) -> None:
    listed = _extension.build_info()["cuda_arch_list"]
    if not {"8.0", "9.0"} <= {number.split("+")[0] for number in listed.split(";")}:
        pytest.skip(f"built for TORCH_CUDA_ARCH_LIST={listed}")
    assert {"sm_80", "sm_90"} <= set(machine_code)


def check_every_kernel_is_there(code: dict[str, dict[str, Kernel]]) -> None:
    for architecture, kernels in code.items():
        for packed in (True, False):
            found = Counter(k.name for k in kernels.values() if k.packed == packed)
            plain = Counter({} if packed else PLAIN)
            assert found - plain == {n: 3 * forms for n, forms in KERNELS.items()}, architecture
            assert plain <= found, architecture


def check_registers_hold_everything(code: dict[str, dict[str, Kernel]]) -> None:
    for architecture, kernels in code.items():
        for function, kernel in kernels.items():
            where = f"{architecture} {function}"
            assert (kernel.stack, kernel.local) == (0, 0), f"{where} uses local memory"
            most = MOST_REGISTERS[kernel.name]
            assert kernel.registers <= most, f"{where}: {kernel.registers} registers"
            spills = [i for i in kernel.instructions if re.match(r"(LDL|STL)\b", i)]
            assert not spills, f"{where}: {spills}"


def check_packed_kernels_move_16_bytes(code: dict[str, dict[str, Kernel]]) -> None:
    for architecture, kernels in code.items():
        for function, kernel in kernels.items():
            if not kernel.packed:
                continue
            where = f"{architecture} {function}"
            names = list(kernel.instructions)
            assert any(re.match(r"LDG\.E(\.NA)?\.128\.CONSTANT", i) for i in names), where
            assert any(re.match(r"STG\.E(\.NA)?\.128", i) for i in names), f"{where}: {names}"
            halves = [i for i in names if re.match(r"(LDG|STG)\.E\.U16", i)]
            assert not halves, f"{where}: single 16-bit values: {halves}"
            ordered = [i for i in names if re.match(r"STG.*STRONG|LDG.*STRONG\.SYS", i)]
            assert not ordered, f"{where}: ordered accesses where plain ones would do: {ordered}"


def check_no_double_precision(code: dict[str, dict[str, Kernel]]) -> None:
    for architecture, kernels in code.items():
        for function, kernel in kernels.items():
            doubles = [i for i in kernel.instructions if re.match(r"D(ADD|MUL|FMA)\b|F2F.*F64", i)]
            assert not doubles, f"{architecture} {function}: {doubles}"


def check_reductions_use_warps_and_tickets(code: dict[str, dict[str, Kernel]]) -> None:
    for architecture, kernels in code.items():
        for function, kernel in kernels.items():
            names = " ".join(kernel.instructions)
            reduces = kernel.name.endswith(("stats_kernel", "reduce_kernel"))
            for opcode in ("SHFL.DOWN", "ATOM", "BAR.SYNC"):
                wanted = reduces or (opcode == "BAR.SYNC" and kernel.name not in WITHOUT_BARRIERS)
                assert (opcode in names) == wanted, f"{architecture} {function}: {opcode}"
            # Stores before the ticket, loads behind it.
            fences = sum(n for i, n in kernel.instructions.items() if i.startswith("MEMBAR"))
            assert fences >= 2 * reduces, f"{architecture} {function}: {fences} fences"


CHECKS = [
    check_every_kernel_is_there,
    check_registers_hold_everything,
    check_packed_kernels_move_16_bytes,
    check_no_double_precision,
    check_reductions_use_warps_and_tickets,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_machine_code(machine_code: dict[str, dict[str, Kernel]], check: Callable) -> None:
    check(machine_code)


@pytest.mark.slow
def test_every_architecture(cuobjdump: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc")
    source, result = tmp_path / "launches.cu", tmp_path / "launches.o"
    source.write_text(LAUNCHES)
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", *codes]
    subprocess.run([nvcc, *flags, "-c", str(source), "-o", str(result)], check=True)
    code = read_machine_code(cuobjdump, result)
    assert set(code) == {f"sm_{number}" for number in ARCHITECTURES}
    for check in CHECKS:
        check(code)
