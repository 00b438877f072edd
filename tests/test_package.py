# SPDX-License-Identifier: Apache-2.0
"""The package as it was built and installed: the kernels that were compiled are the ones that run,
the build's switches, and what the libraries contain."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import cpp_extension

import fastresnet
from fastresnet import _extension, models

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastresnet.__file__).parent
OPERATORS = ("bn_stats", "bn", "bn_relu", "bn_add_relu", "bn_add_bn_relu", "bn_relu_max_pool")
OPERATORS += ("global_avg_pool",)
BACKWARD = tuple(f"{name}_backward" for name in OPERATORS[1:])


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(*command: str | Path, **variables: str) -> str:
    done = run(*command, **variables)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


class TestKernelsRun:
    """Fails if the extension silently falls back to plain torch."""

    def test_the_cpu_library_is_active(self) -> None:
        assert _extension.cpu_missing is None
        assert torch.ops.fastresnet.isa() in torch.ops.fastresnet.isa_levels()

    @pytest.mark.parametrize("name", OPERATORS + BACKWARD)
    def test_every_operator_has_a_cpu_kernel(self, name: str) -> None:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastresnet::{name}", "CPU")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_a_training_step_runs_them(self, dtype: torch.dtype) -> None:
        """A ResNet runs every kind of join, its blocks on our convolutions where the level has
        them (which one it has is fixed in ops/conv.py, so a silent fallback fails here)."""
        model = models.resnet18(num_classes=4).to(memory_format=torch.channels_last).train()
        images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        model, images = model.to(dtype), images.to(dtype)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            model(images).sum().backward()
        seen = {event.name for event in recorded.events()}
        expected = {"bn_add_relu", "bn_add_bn_relu", "global_avg_pool", "global_avg_pool_backward"}
        if torch.ops.fastresnet.isa() in ("amx", "avx512_bf16", "avx512", "avx2"):
            expected |= {"conv_stats", "bn_sums", "conv_bn_backward"}
        else:
            expected |= {"bn_relu", "bn_relu_backward"}
            expected |= {"bn_add_relu_backward", "bn_add_bn_relu_backward"}
        if torch.ops.fastresnet.isa() != "default":
            expected |= {"bn_relu_max_pool", "bn_relu_max_pool_backward"}
        assert {f"fastresnet::{name}" for name in expected} <= seen
        assert not {name for name in seen if "batch_norm" in name}

    def test_disabled_kernels_are_noticed(self) -> None:
        """What the other tests look at does say so when the kernels are off."""
        code = "from fastresnet import _extension; print(_extension.cpu_missing)"
        said = succeed(sys.executable, "-c", code, FASTRESNET_DISABLE="1", PYTHONPATH=search_path())
        assert said.strip() == "FASTRESNET_DISABLE=1"


def search_path() -> str:
    """For a child process to find this very package, installed or built in place."""
    return str(PACKAGE.parent)


class TestBuildInfo:
    def test_it_describes_this_build(self) -> None:
        info = _extension.build_info()
        assert info["version"] == fastresnet.__version__
        assert info["compiler"]
        assert info["cuda_reason"]
        assert set(torch.ops.fastresnet.isa_levels()) <= set(info["isa_levels"])

    def test_a_cuda_library_is_there_exactly_if_it_says_so(self) -> None:
        info = _extension.build_info()
        expected = {"_C.abi3.so"}
        if info["cuda"] is not None:
            expected.add(f"_C_cuda{info['cuda'].split('.')[0]}.abi3.so")
            assert info["cuda_arch_list"]
        assert {path.name for path in PACKAGE.glob("_C*.so")} == expected

    def test_a_cuda_library_for_this_torch_registers_its_kernels(self) -> None:
        built, here = _extension.build_info()["cuda"], torch.version.cuda
        matches = bool(built and here) and built.split(".")[0] == here.split(".")[0]
        # Where it is not there, what is registered says why.
        registered = torch._C._dispatch_has_kernel_for_dispatch_key("fastresnet::bn_relu", "CUDA")
        assert registered
        assert (_extension.cuda_missing is None) == matches


class TestTensorsOnAGpu:
    """What becomes of them where the library has no kernels for them; no GPU is needed to ask."""

    def test_without_the_cuda_library_operators_refuse_and_modules_warn(
        self, tmp_path: Path
    ) -> None:
        copy = tmp_path / "fastresnet"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C_cuda*", "__pycache__"))
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
            + """
# An editable install's finder would find the library where it was built.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import warnings, torch
from fastresnet import _extension
operator, x = torch.ops.fastresnet.bn_stats.default, torch.randn(2, 8, 4, 4)
x = x.contiguous(memory_format=torch.channels_last)
assert operator(x)[0].shape == (8,)
try:
    operator._op_dk(torch._C.DispatchKey.CUDA, x)  # as for a tensor there
except RuntimeError as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert [_extension.takes(torch.device("cuda", 0)) for _ in range(2)] == [False, False]
print(*(str(warning.message) for warning in caught), sep="|")
"""
        )
        (copy / "_build.json").write_text('{"cuda_reason": "no nvcc found"}')
        lines = succeed(sys.executable, "-c", code).splitlines()
        cuda = torch.version.cuda
        why = f"built without CUDA {cuda} (no nvcc found)" if cuda else "is a CPU build"
        assert lines[0].startswith("expected an operator of fastresnet on CUDA, got none: ")
        assert lines[1].startswith("fastresnet runs on plain torch on GPUs: ")
        assert all(line.endswith(why) for line in lines)
        assert len(lines) == 2

    @pytest.mark.parametrize(
        ("capability", "built", "runs"),
        [
            ((8, 0), "8.0;9.0+PTX", True),
            ((8, 9), "8.0;9.0+PTX", True),
            ((9, 0), "8.0 9.0", True),
            ((10, 0), "8.0;9.0+PTX", True),
            ((10, 0), "8.0;9.0", False),
            ((7, 5), "8.0;9.0+PTX", False),
            ((8, 0), "8.6", False),
            ((9, 0), "9.0a", True),
            ((9, 1), "9.0a+PTX", False),
            ((7, 5), "native", True),
            ((7, 5), None, True),
        ],
    )
    def test_which_gpus_a_build_runs_on(self, capability, built, runs) -> None:
        assert _extension.has_code(capability, built) == runs

    def test_a_gpu_without_code_is_an_error_that_says_what_to_do(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_extension, "build_info", lambda: {"cuda_arch_list": "8.0;9.0"})
        monkeypatch.setitem(_extension._active, "cuda", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
        _extension._check_architecture.cache_clear()
        try:
            with pytest.raises(RuntimeError, match=r"GPU 1 .* 7\.5, got code for 8\.0;9\.0; build"):
                _extension.takes(torch.device("cuda", 1))
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
            assert _extension.takes(torch.device("cuda", 1))
        finally:
            _extension._check_architecture.cache_clear()


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree beside the tests")
class TestSwitches:
    """setup.py run for its decisions alone."""

    def test_cuda_0_is_taken(self) -> None:
        said = succeed(sys.executable, "setup.py", "--version", FASTRESNET_CUDA="0")
        assert said.split()[-1] == fastresnet.__version__

    def test_another_cuda_value_is_refused(self) -> None:
        done = run(sys.executable, "setup.py", "--version", FASTRESNET_CUDA="yes")
        assert done.returncode != 0
        assert "FASTRESNET_CUDA must be auto, 0 or 1, got 'yes'" in done.stderr

    def test_cuda_1_without_a_toolkit_fails_and_says_why(self, tmp_path: Path) -> None:
        switches = {"FASTRESNET_CUDA": "1", "CUDA_HOME": str(tmp_path)}
        done = run(sys.executable, "setup.py", "--version", **switches)
        assert done.returncode != 0
        assert "FASTRESNET_CUDA=1, but " in done.stderr

    def test_no_compiler_is_one_sentence(self) -> None:
        done = run(sys.executable, "setup.py", "build_ext", CXX="no-such-compiler")
        assert done.returncode != 0
        assert "there is no 'no-such-compiler'" in done.stderr
        assert "Traceback" not in done.stderr

    def test_too_old_a_compiler_is_one_sentence(self, tmp_path: Path) -> None:
        old = tmp_path / "old-compiler"
        old.write_text('#!/bin/sh\nexec c++ "$@" -std=c++17\n')
        old.chmod(0o755)
        done = run(sys.executable, "setup.py", "build_ext", CXX=str(old))
        assert done.returncode != 0
        assert "building needs g++ 11 or clang++ 14" in done.stderr
        assert "Traceback" not in done.stderr


class TestLibraries:
    @pytest.mark.parametrize("library", sorted(PACKAGE.glob("_C*.so")), ids=lambda path: path.name)
    def test_only_the_module_is_exported(self, library: Path) -> None:
        listed = succeed("nm", "-D", "--defined-only", library)
        names = [line.split()[-1] for line in listed.splitlines() if line]
        assert names == [f"PyInit_{library.name.split('.')[0]}"]

    def test_the_cpu_library_needs_no_cuda(self) -> None:
        needed = re.findall(
            r"NEEDED\s+(\S+)", succeed("objdump", "-p", next(PACKAGE.glob("_C.*.so")))
        )
        assert "libtorch_cpu.so" in needed
        assert not [name for name in needed if "cuda" in name or "python" in name]


# The levels' instructions, each beyond those before it. A kernel of one level may use them up to
# its own; every other function of the library must run on any x86-64 processor.
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
# Before a VEX or EVEX prefix may stand: segment and address-size prefixes.
LEGACY_PREFIXES = {"26", "2e", "36", "3e", "64", "65", "67"}


def level_of_instruction(code: list[str], mnemonic: str) -> str:
    """In 64-bit mode just the VEX (c4, c5) and EVEX (62) instructions start with these bytes."""
    first = next(byte for byte in code if byte not in LEGACY_PREFIXES)
    if first not in ("c4", "c5", "62"):
        return "baseline"
    if re.match(r"tile|tdp|ldtilecfg|sttilecfg", mnemonic):
        return "amx"
    if "bf16" in mnemonic:
        return "avx512_bf16"
    return "avx512" if first == "62" or mnemonic.startswith("k") else "avx2"


def level_of_function(symbol: str) -> str:
    """By the namespace fastresnet::cpu::<level>, as mangled: demanglers give up on some lambdas."""
    for level in LEVELS[1:]:
        if f"10fastresnet3cpu{len(level)}{level}" in symbol:
            return level
    return "baseline"


def levels_used(objects: list[Path]) -> dict[str, set[str]]:
    """The levels of the instructions in each function of the object files."""
    used: dict[str, set[str]] = defaultdict(set)
    for path in objects:
        symbol = ""
        for line in succeed("objdump", "-d", "-w", path).splitlines():
            if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
                symbol = heading[1]
            elif instruction := re.match(r"\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(\S+)", line):
                used[symbol].add(level_of_instruction(instruction[1].split(), instruction[2]))
    return used


def leaks(used: dict[str, set[str]]) -> list[str]:
    """Functions with an instruction above their own level."""
    return [
        f"{symbol}: {level}"
        for symbol, found in used.items()
        for level in found
        if LEVELS.index(level) > LEVELS.index(level_of_function(symbol))
    ]


def compile_objects(sources: list[Path], folder: Path, *options: str) -> list[Path]:
    """Object files of `sources`, compiled as setup.py does but for the options."""
    headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    headers += [f"-I{ROOT / 'csrc'}", f"-I{sysconfig.get_path('include')}"]
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-fPIC"]
    compiler += ["-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000", *headers]
    objects = []
    for number, source in enumerate(sources):
        objects.append(folder / f"{number}_{source.stem}.o")
        succeed(*compiler, *options, "-c", source, "-o", objects[-1])
    return objects


def cpu_sources() -> list[Path]:
    return [ROOT / "csrc" / "library.cpp", *sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the levels are x86-64's")
class TestInstructions:
    """A program that dies of an illegal instruction on an older processor does so far from its
    cause: an inline function of a standard header, compiled once for AVX-512 and kept for all."""

    def built_objects(self) -> list[Path]:
        """What the build in this source tree compiled."""
        objects = []
        for source in cpu_sources():
            name = source.relative_to(ROOT).with_suffix(".o")
            found = [
                path
                for path in ROOT.glob(f"build/temp*/{name}")
                if path.stat().st_mtime >= source.stat().st_mtime
            ]
            if not found:
                pytest.skip(f"no build of {name} in this source tree")
            objects.append(max(found, key=lambda path: path.stat().st_mtime))
        return objects

    def test_no_leak_in_the_build(self) -> None:
        assert leaks(levels_used(self.built_objects())) == []

    @pytest.mark.parametrize("level", LEVELS[1:])
    def test_each_level_uses_its_instructions(self, level: str) -> None:
        used = levels_used(self.built_objects())
        found = {
            name
            for symbol, names in used.items()
            if level_of_function(symbol) == level
            for name in names
        }
        # Batch norm has no matrix product: the tiles come with the convolutions.
        assert ("avx512_bf16" if level == "amx" else level) in found

    @pytest.mark.slow
    @pytest.mark.parametrize("option", ["-O0", "-O3"])
    def test_no_leak_at(self, option: str, tmp_path: Path) -> None:
        """Unoptimised code keeps the copies that inlining hides."""
        assert leaks(levels_used(compile_objects(cpu_sources(), tmp_path, option))) == []

    def test_a_planted_leak_is_found(self, tmp_path: Path) -> None:
        source = tmp_path / "planted.cpp"
        source.write_text(
            "namespace fastresnet::cpu::avx2 { float fine(const float* x) { return x[0] + x[1]; } }"
            "float leak(const float* x) { return x[0] + x[1]; }"
        )
        found = leaks(levels_used(compile_objects([source], tmp_path, "-O1", "-mavx2")))
        assert found == ["_Z4leakPKf: avx2"]


@pytest.mark.slow
def test_sdist_to_wheel_to_a_clean_environment(tmp_path: Path) -> None:
    """Everything the build needs is in the sdist, and everything the package needs in the wheel."""
    build_sdist = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    succeed(sys.executable, "-c", build_sdist, FASTRESNET_CUDA="0")
    sdist = next(tmp_path.glob("fastresnet-*.tar.gz"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    wheel_options = ("--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path)
    succeed(*pip, "wheel", *wheel_options, sdist, FASTRESNET_CUDA="0")
    wheel = next(tmp_path.glob("fastresnet-*.whl"))
    assert "-cp310-abi3-" in wheel.name

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    succeed(python, "-I", "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    # torch itself is borrowed from this environment, after the new one's own packages.
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(succeed(python, "-c", query).strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    code = (
        "import fastresnet; from fastresnet import _extension as e;"
        "print(fastresnet.__file__, e.cpu_missing, e.build_info()['cuda_reason'], sep='|')"
    )
    done = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    file, cpu_missing, cuda_reason = done.stdout.strip().split("|")
    assert Path(file).is_relative_to(packages)
    assert (cpu_missing, cuda_reason) == ("None", "FASTRESNET_CUDA=0")
    assert (environment / "bin" / "fastresnet").exists()
