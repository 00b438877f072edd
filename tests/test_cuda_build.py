# SPDX-License-Identifier: Apache-2.0
"""The built CUDA library, looked at without a GPU: registered operators and machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fastresnet import _extension

FORMS = ["bn", "bn_relu", "bn_add_relu", "bn_add_bn_relu"]
OPERATORS = ["bn_stats", *FORMS, *(f"{form}_backward" for form in FORMS)]
KERNELS = {  # how many forms of each; every form in three dtypes, packed and not
    "bn_stats_kernel": 1,
    "bn_forward_kernel": 4,
    "bn_backward_reduce_kernel": 4,
    "bn_backward_kernel": 4,
}
# Beyond this, a multiprocessor holds fewer than 512 threads.
MOST_REGISTERS = 128

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


@pytest.fixture(scope="module")
def machine_code(cuobjdump: Path) -> dict[str, dict[str, Kernel]]:
    """Architecture -> mangled name -> kernel."""
    # cuobjdump finds nvdisasm, which lies beside it, on PATH only.
    environment = os.environ | {"PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"}

    def dump(what: str) -> list[str]:
        command = [str(cuobjdump), what, str(library())]
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
            name = re.search(r"bn_\w+?_kernel", function)[0]
            packed = re.search(r"Lb([01])E", function)[1] == "1"
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


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_is_registered_without_a_gpu(operator: str) -> None:
    name = f"fastresnet::{operator}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def test_architectures(machine_code: dict[str, dict[str, Kernel]]) -> None:
    listed = _extension.build_info()["cuda_arch_list"]
    if not {"8.0", "9.0"} <= {number.split("+")[0] for number in listed.split(";")}:
        pytest.skip(f"built for TORCH_CUDA_ARCH_LIST={listed}")
    assert {"sm_80", "sm_90"} <= set(machine_code)


def test_every_kernel_is_there(machine_code: dict[str, dict[str, Kernel]]) -> None:
    for architecture, kernels in machine_code.items():
        for packed in (True, False):
            found = Counter(k.name for k in kernels.values() if k.packed == packed)
            assert found == {name: 3 * forms for name, forms in KERNELS.items()}, architecture


def test_registers_hold_everything(machine_code: dict[str, dict[str, Kernel]]) -> None:
    for architecture, kernels in machine_code.items():
        for function, kernel in kernels.items():
            where = f"{architecture} {function}"
            assert (kernel.stack, kernel.local) == (0, 0), f"{where} uses local memory"
            assert kernel.registers <= MOST_REGISTERS, f"{where}: {kernel.registers} registers"
            spills = [i for i in kernel.instructions if re.match(r"(LDL|STL)\b", i)]
            assert not spills, f"{where}: {spills}"


def test_packed_kernels_move_16_bytes_at_a_time(
    machine_code: dict[str, dict[str, Kernel]],
) -> None:
    for architecture, kernels in machine_code.items():
        for function, kernel in kernels.items():
            if not kernel.packed:
                continue
            where = f"{architecture} {function}"
            names = list(kernel.instructions)
            assert "LDG.E.128.CONSTANT" in names, f"{where}: {names}"
            assert "STG.E.128" in names, f"{where}: {names}"
            halves = [i for i in names if re.match(r"(LDG|STG)\.E\.U16", i)]
            assert not halves, f"{where}: single 16-bit values: {halves}"
            ordered = [i for i in names if re.match(r"STG.*STRONG|LDG.*STRONG\.SYS", i)]
            assert not ordered, f"{where}: ordered accesses where plain ones would do: {ordered}"


def test_no_double_precision(machine_code: dict[str, dict[str, Kernel]]) -> None:
    for architecture, kernels in machine_code.items():
        for function, kernel in kernels.items():
            doubles = [i for i in kernel.instructions if re.match(r"D(ADD|MUL|FMA)\b|F2F.*F64", i)]
            assert not doubles, f"{architecture} {function}: {doubles}"
