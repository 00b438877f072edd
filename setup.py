# SPDX-License-Identifier: Apache-2.0
"""Builds fastresnet's libraries against torch's stable ABI.

fastresnet._C holds the CPU kernels and is always built. fastresnet._C_cuda<major> holds the CUDA
kernels and is built wherever nvcc and a CUDA torch of the same major version are found, whether or
not a GPU is visible. What was built, and why, goes to fastresnet/_build.json.

Environment: FASTRESNET_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, CXX.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import setup
from setuptools.command.build import build

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "fastresnet: building needs torch 2.10 or newer here: install it first, or leave out "
        f"--no-build-isolation ({error})"
    ) from error

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # MINIMUM_TORCH, as torch encodes it
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"
# Free-threaded Python has no limited API.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")

# What every kernel file needs of a compiler: C++20, Python's headers, intrinsics by function.
COMPILER_PROBE = """
#include <Python.h>
#include <span>
#if defined(__x86_64__)
#include <immintrin.h>
__attribute__((target("avx512f,avx512bf16,amx-tile,amx-bf16"))) void probe() { _tile_release(); }
#endif
int size(std::span<const int> values) { return static_cast<int>(values.size()); }
"""


class CudaDecision(NamedTuple):
    """Whether the CUDA library is built, with which toolkit, and the reason in a few words."""

    build: bool
    reason: str
    home: Path | None = None
    version: str | None = None


def say(message: str) -> None:
    print(f"fastresnet: {message}", flush=True)


def output_of(command: list[str]) -> str:
    """Standard output and error of a command that may fail."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout


def cuda_request() -> str:
    request = os.environ.get("FASTRESNET_CUDA") or "auto"
    if request not in ("auto", "0", "1"):
        raise SystemExit(f"fastresnet: FASTRESNET_CUDA must be auto, 0 or 1, got {request!r}")
    return request


def find_toolkit() -> tuple[Path, str] | str:
    """The CUDA toolkit's folder and version ("13.0"), or why there is none."""
    named = os.environ.get("CUDA_HOME")
    if named:
        nvcc = shutil.which("nvcc", path=f"{named}/bin")
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return f"no nvcc in CUDA_HOME={named}" if named else "no nvcc found"
    release = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]))
    if release is None:
        return f"{nvcc} --version names no release"
    # nvcc may be a wrapper script that lies outside its toolkit, so it is asked where that is.
    dry_run = output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull])
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
    home = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    return home.resolve(), release[1]


def decide_cuda() -> CudaDecision:
    if cuda_request() == "0":
        return CudaDecision(False, "FASTRESNET_CUDA=0")
    decision = examine_cuda()
    if cuda_request() == "1" and not decision.build:
        raise SystemExit(f"fastresnet: FASTRESNET_CUDA=1, but {decision.reason}")
    return decision


def examine_cuda() -> CudaDecision:
    if not sources("csrc/cuda", ".cu"):
        return CudaDecision(False, "csrc/cuda holds no kernels")
    if torch.version.cuda is None:
        return CudaDecision(False, f"torch {torch.__version__} is a CPU build")
    toolkit = find_toolkit()
    if isinstance(toolkit, str):
        return CudaDecision(False, toolkit)
    home, version = toolkit
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = f"nvcc is {version} and torch's CUDA {torch.version.cuda}: another major version"
        return CudaDecision(False, reason)
    reason = f"nvcc {version} in {home}, torch's CUDA {torch.version.cuda}"
    return CudaDecision(True, reason, home, version)


def sources(folder: str, *suffixes: str) -> list[str]:
    """Files below `folder`, relative to this one: setuptools refuses absolute names in an sdist."""
    files = (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return sorted(str(path.relative_to(ROOT)) for path in files)


def extensions(cuda: CudaDecision) -> list:
    host = ["-O3", "-g0", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    # gcc 12 warns of its own intrinsics' undefined operands (its bug 105593).
    host += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized", STABLE_ABI]
    # System headers raise no warnings: -Wextra is for our own files.
    host += [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    headers = [*sources("csrc", ".h", ".cuh"), "csrc/exports.map"]
    shared = {
        "py_limited_api": LIMITED_API,
        "include_dirs": [str(ROOT / "csrc")],
        "depends": headers,
        "extra_link_args": ["-Wl,-s", f"-Wl,--version-script={ROOT / 'csrc/exports.map'}"],
    }
    cpu_library = cpp_extension.CppExtension(
        "fastresnet._C",
        ["csrc/library.cpp", *sources("csrc/cpu", ".cpp")],
        extra_compile_args={"cxx": host},
        **shared,
    )
    if not cuda.build:
        return [cpu_library]

    # A library of its own: it needs libcudart and libtorch_cuda, which a CPU torch does not have.
    cpp_extension.CUDA_HOME = str(cuda.home)  # torch's own guess misses behind a wrapped nvcc
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCH_LIST
    major = cuda.version.split(".")[0]
    defines = [STABLE_ABI, "-DUSE_CUDA", f"-DFASTRESNET_CUDA_MAJOR={major}"]
    device = ["-O3", *defines, "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]
    cuda_library = cpp_extension.CUDAExtension(
        f"fastresnet._C_cuda{major}",
        sources("csrc/cuda", ".cpp", ".cu"),
        extra_compile_args={"cxx": [*host, *defines[1:]], "nvcc": device},
        **shared,
    )
    return [cpu_library, cuda_library]


def check_compiler() -> str:
    """The C++ compiler's name and version; ends the build in one sentence if it will not do."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    wanted = "fastresnet: building needs g++ 11 or clang++ 14, or newer"
    if shutil.which(compiler[0]) is None:
        raise SystemExit(f"{wanted}, but there is no {compiler[0]!r} (CXX names another)")
    headers = f"-I{sysconfig.get_path('include')}"
    done = subprocess.run(
        [*compiler, "-std=c++20", headers, "-fsyntax-only", "-x", "c++", "-"],
        input=COMPILER_PROBE,
        capture_output=True,
        text=True,
        check=False,
    )
    version = output_of([*compiler, "--version"]).partition("\n")[0]
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise SystemExit(
            f"{wanted}, and Python's headers, but {version or compiler[0]} "
            f"says {(errors or ['no more than its exit status'])[0].strip()}"
        )
    return version


class Build(build):
    """Starts from an empty build/lib: a file renamed since the last build would be packed again."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildLibraries(cpp_extension.BuildExtension):
    """Builds the CPU library, then the CUDA library if it can, and records what came of it."""

    def run(self) -> None:
        self.cxx = check_compiler()
        self.cuda = CUDA
        what = "CPU and CUDA" if CUDA.build else "CPU only"
        say(f"building for {what} ({CUDA.reason}) with torch {torch.__version__} and {self.cxx}")
        super().run()
        self.write_build_info()

    def build_extensions(self) -> None:
        wanted, self.extensions = self.extensions, self.extensions[:1]
        super().build_extensions()
        for cuda_library in wanted[1:]:
            self.extensions = [cuda_library]
            try:
                super().build_extensions()
            except Exception as error:  # torch raises RuntimeError, setuptools its own kinds
                if cuda_request() == "1":
                    raise
                self.cuda = CudaDecision(False, "the CUDA library did not compile")
                say(f"CPU only: {self.cuda.reason}: {str(error).partition(chr(10))[0]}")
                wanted = wanted[:1]
        self.extensions = wanted

    def write_build_info(self) -> None:
        package = Path(self.get_ext_fullpath("fastresnet._C")).resolve().parent
        built = {Path(self.get_ext_fullpath(library.name)).name for library in self.extensions}
        for stale in set(package.glob("_C*.so")) - {package / name for name in built}:
            stale.unlink()  # left in place by a build with other settings
        levels = sources("csrc/cpu/kernels", ".cpp")
        info = {
            "version": self.distribution.get_version(),
            "compiler": self.cxx,
            "torch": torch.__version__,
            "cuda": self.cuda.version,
            "cuda_reason": self.cuda.reason,
            "cuda_arch_list": os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
            if self.cuda.build
            else None,
            "isa_levels": [
                Path(name).stem.removeprefix("isa_") for name in levels if "/isa_" in name
            ],
        }
        (package / "_build.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


if tuple(int(number) for number in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
    raise SystemExit(f"fastresnet: building needs torch 2.10 or newer, found {torch.__version__}")

CUDA = decide_cuda()

setup(
    ext_modules=extensions(CUDA),
    cmdclass={"build": Build, "build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
