# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of csrc/cuda on the host: builds them with g++ and calls them on CPU tensors.

Every tensor a kernel gets is declared to the emulator, so that an access outside of all of them is
an error, and every output starts as NaN, so that a value nobody wrote shows.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EPILOGUES = {"bn": 0, "bn_relu": 1, "bn_add_relu": 2, "bn_add_bn_relu": 3}


class EmulatorError(RuntimeError):
    """What the emulator saw a kernel do wrong."""


def toolkit_include() -> Path | str:
    """The folder of CUDA's headers, or why there is none."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return "no nvcc found, so no CUDA headers"
    # nvcc may be a wrapper script that lies outside its toolkit, so it is asked where that is.
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    dry_run = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
    if top is None:
        return "nvcc --dryrun does not name its toolkit"
    include = Path(top[1].strip(), "include").resolve()
    if not (include / "cuda_fp16.h").exists():
        return f"{include} has no cuda_fp16.h"
    return include


SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(cache: Path, name: str, include: Path) -> ctypes.CDLL:
    """The emulator and ``name``.cpp of this folder as one library, built once per content; with
    AddressSanitizer and UndefinedBehaviorSanitizer where FASTRESNET_EMULATOR_SANITIZE=1."""
    headers = [*HERE.glob("*.h"), *CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh")]
    command = [*compiler(), "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{CSRC}"]
    command += ["-isystem", str(include), "-c"]
    objects = []
    for source in ("emulator", "memory", name):
        file = HERE / f"{source}.cpp"
        objects.append(made(cache / f"{source}.o", [*command, str(file)], [file, *headers]))
    link = [*compiler(), "-shared", *map(str, objects)]
    return ctypes.CDLL(str(made(cache / f"{name}.so", link, objects)))


def compiler(optimisation: str = "-O2") -> list[str]:
    """The command that all of this folder is compiled with."""
    # -fno-gnu-unique: or libraries in one process would share the variables of inline functions,
    # __shared__ too.
    command = ["g++", "-std=c++20", optimisation, "-fPIC", "-fno-gnu-unique"]
    if os.environ.get("FASTRESNET_EMULATOR_SANITIZE") == "1":
        command += SANITIZERS
    return [*command, "-Wall", "-Wextra", "-Werror"]


def made(file: Path, command: Sequence[str], inputs: Sequence[Path]) -> Path:
    """What ``command`` makes of ``inputs``, in a file like ``file`` whose name tells all that."""
    digest = hashlib.sha256(repr(command).encode())
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    made = file.with_stem(f"{file.stem}-{digest.hexdigest()[:16]}")
    if not made.exists():
        unfinished = made.with_suffix(f".{os.getpid()}{made.suffix}")
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.rename(made)
    return made


def sanitized(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``command`` so that what it builds here can be loaded with the sanitizers in it."""

    def runtime(name: str) -> str:
        found = ["g++", f"-print-file-name={name}"]
        return subprocess.run(found, capture_output=True, text=True, check=True).stdout.strip()

    variables = {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "FASTRESNET_EMULATOR_SANITIZE": "1",
    }
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables | environment,
    )


class Count(NamedTuple):
    """What was loaded from global memory, or stored to it."""

    bytes: int  # that threads asked for
    transactions: int  # 32-byte sectors, counted once for each instruction of a warp
    sectors: int  # 32-byte sectors, counted once a launch: what an endless cache passes on


class Traffic(NamedTuple):
    """What the launches of one run moved."""

    loaded: Count
    stored: Count


@dataclass(frozen=True)
class Schedule:
    """In which order threads run: in order for seed 0, else drawn at random from it.

    ``hold_permille`` of the stores to global memory hold their thread back until no other of the
    ``resident_blocks`` that run side by side can go on.
    """

    seed: int = 0
    resident_blocks: int = 1
    hold_permille: int = 0

    @classmethod
    def drawn(cls, seed: int) -> Schedule:
        """One of many that differ in all three."""
        return cls(seed, 1 + seed % 4, 40 * (seed % 3))


class Emulator:
    """Runs launches of one built library; an error of a kernel is an :class:`EmulatorError`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.emulator_error.restype = ctypes.c_char_p
        self.schedule = Schedule()
        self.skipped_line = 0  # of a barrier or fence
        self.skip_memset = False
        self.ticket_error = 0

    def run(
        self, function: str, arguments: Sequence[object], restype: type | None = None
    ) -> object:
        """Calls ``function`` of the library. Tensors and lists of tensors become addresses."""
        library = self.library
        library.emulator_reset()
        schedule = self.schedule
        library.emulator_schedule(
            ctypes.c_uint64(schedule.seed), schedule.resident_blocks, schedule.hold_permille
        )
        library.emulator_skip(self.skipped_line)
        if self.skip_memset:
            library.emulator_skip_memset()
        library.emulator_spoil_tickets(self.ticket_error)
        call = getattr(library, function)
        call.restype = restype
        result = call(*[self._argument(argument) for argument in arguments])
        if error := library.emulator_error():
            raise EmulatorError(error.decode())
        return result

    @property
    def traffic(self) -> Traffic:
        """What the last run moved between kernels and global memory."""
        counts = (ctypes.c_int64 * 6)()
        self.library.emulator_traffic(counts)
        return Traffic(Count(*counts[:3]), Count(*counts[3:]))

    def barriers(self) -> list[int]:
        """Source lines of the barriers that kernels have met so far."""
        return self._lines(self.library.emulator_barriers)

    def fences(self) -> list[int]:
        """The same of fences."""
        return self._lines(self.library.emulator_fences)

    @staticmethod
    def _lines(met: Callable[..., int]) -> list[int]:
        lines = (ctypes.c_uint * 64)()
        return lines[: met(lines, len(lines))]

    def _argument(self, value: object) -> object:
        if isinstance(value, Tensor):
            size = value.numel() * value.element_size()
            self.library.emulator_declare(ctypes.c_void_p(value.data_ptr()), ctypes.c_int64(size))
            return ctypes.c_void_p(value.data_ptr())
        if isinstance(value, (list, tuple)):
            return (ctypes.c_void_p * len(value))(*(self._argument(v) for v in value))
        if isinstance(value, int) and not isinstance(value, bool):
            return ctypes.c_int64(value)
        if isinstance(value, float):
            return ctypes.c_float(value)
        return value


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An output that holds NaN (uint8: 255) until it is written, 16-byte aligned."""
    out = torch.empty(*shape, dtype=dtype)
    out.view(torch.uint8).fill_(255)
    return out


@dataclass(frozen=True)
class Norm:
    """The vectors of one batch norm, float32 [C] each."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5

    @property
    def vectors(self) -> list[Tensor]:
        return [self.mean, self.var, self.weight, self.bias]


class PlantedKernels(Emulator):
    """The kernels of planted.cpp, right ones and such with a mistake."""

    def run_case(self, name: str, schedules: Sequence[Schedule]) -> None:
        """Runs a kernel under every schedule; raises :class:`EmulatorError` where it is noticed."""
        self.library.planted_name.restype = ctypes.c_char_p
        names = map(self.library.planted_name, itertools.count())
        index = [text.decode() for text in itertools.takewhile(bool, names)].index(name)
        for schedule in schedules:
            self.schedule = schedule
            out, ticket = unwritten((4,), torch.float32), torch.zeros(1, dtype=torch.int32)
            self.run("planted_run", [index, out, ticket])
            if out[0] != 64.0:
                raise EmulatorError(f"wrong result {out.tolist()}")


class BatchNormKernels(Emulator):
    """csrc/cuda/bn_act.cuh on [rows, C] tensors, as on a device of so many multiprocessors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self.multiprocessors = 2

    def stats(self, x: Tensor, sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``x``; from ``sums`` [2, C] of it and its squares if they are
        given."""
        rows, channels = x.shape
        mean, var = (unwritten((channels,), torch.float32) for _ in range(2))
        self.run("bn_stats", [*self._shape(x), x, sums, mean, var, self._workspace(rows, channels)])
        return mean, var

    def scale(self, norm: Norm) -> Tensor:
        scale = unwritten(norm.var.shape, torch.float32)
        self.run("bn_scale", [len(scale), norm.var, norm.weight, norm.eps, scale])
        return scale

    def forward(
        self, form: str, x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None
    ) -> tuple[Tensor, Tensor | None]:
        rows, channels = x.shape
        out = unwritten(x.shape, x.dtype)
        mask = unwritten((rows, (channels + 7) // 8), torch.uint8) if "add" in form else None
        self.run(
            "bn_forward",
            [*self._shape(x, form), x, *self._norms(norm, residual, residual_norm), out, mask],
        )
        return out, mask

    def backward(
        self,
        form: str,
        grad: Tensor,
        mask: Tensor | None,
        x: Tensor,
        norm: Norm,
        residual: Tensor | None,
        residual_norm: Norm | None,
        training: bool,
        shortcut_grad: Tensor | None = None,
    ) -> dict[str, Tensor | None]:
        rows, channels = x.shape
        dual = residual_norm is not None
        outputs = {
            "dx": unwritten(x.shape, x.dtype),
            "dresidual": unwritten(x.shape, x.dtype) if mask is not None else None,
            "dweight": unwritten((channels,), torch.float32),
            "dbias": unwritten((channels,), torch.float32),
            "dresidual_weight": unwritten((channels,), torch.float32) if dual else None,
        }
        masked_grad = unwritten(x.shape, x.dtype) if dual else None
        sums = unwritten((2 * channels,), torch.float32)
        norms = self._norms(norm, residual if dual else None, residual_norm)
        dtype, epilogue, *sizes = self._shape(x, form)
        gradients = [grad, shortcut_grad, mask]
        arguments = [dtype, epilogue, training, *sizes, *gradients, x, *norms, *outputs.values()]
        self.run("bn_backward", [*arguments, masked_grad, sums, self._workspace(rows, channels)])
        return outputs

    def backward_of_sums(
        self,
        dz: Tensor,
        sums: Tensor,
        x: Tensor,
        norm: Norm,
        residual: Tensor | None,
        residual_norm: Norm | None,
        training: bool,
    ) -> dict[str, Tensor | None]:
        """What is left of the backward where ``dz``, the gradient behind the batch norm, and its
        sums [2 or 3, C] are known."""
        channels, dual = x.shape[1], residual_norm is not None
        outputs = {
            "dx": unwritten(x.shape, x.dtype),
            "dresidual": unwritten(x.shape, x.dtype) if dual else None,
            "dweight": unwritten((channels,), torch.float32),
        }
        dresidual_weight = unwritten((channels,), torch.float32) if dual else None
        norms = self._norms(norm, residual, residual_norm)
        dtype, epilogue, *sizes = self._shape(x, "bn_add_bn_relu" if dual else "bn")
        gradients = [None if dual else dz, None, None]
        arguments = [dtype, epilogue, training, *sizes, *gradients, x, *norms, *outputs.values()]
        arguments += [sums[0], dresidual_weight, dz if dual else None, sums[1:], None]
        self.run("bn_backward", arguments)
        return outputs | {"dresidual_weight": dresidual_weight}

    def _shape(self, x: Tensor, form: str | None = None) -> list[int]:
        epilogue = [] if form is None else [EPILOGUES[form]]
        return [DTYPES[x.dtype], *epilogue, *x.shape, self.multiprocessors]

    def _workspace(self, rows: int, channels: int) -> Tensor:
        size = self.run("bn_workspace", [rows, channels, self.multiprocessors], ctypes.c_int64)
        return unwritten((size,), torch.uint8)

    @staticmethod
    def _norms(norm: Norm, residual: Tensor | None, residual_norm: Norm | None) -> list[object]:
        vectors = [None] * 4 if residual_norm is None else residual_norm.vectors
        eps = 0.0 if residual_norm is None else residual_norm.eps
        return [norm.vectors, norm.eps, residual, vectors, eps]


class MaxPoolKernels(Emulator):
    """csrc/cuda/max_pool.cuh on [N, H, W, C] tensors; windows are kernel, stride and padding."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self.multiprocessors = 2

    def forward(self, x: Tensor, norm: Norm, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        sizes, pooled = self._sizes(x, windows)
        out, index = unwritten(pooled, x.dtype), unwritten(pooled, torch.uint8)
        arguments = [DTYPES[x.dtype], sizes, self.multiprocessors, x, norm.vectors, norm.eps]
        self.run("max_pool_forward", [*arguments, out, index])
        return out, index

    def backward(
        self,
        grad: Tensor,
        index: Tensor,
        x: Tensor,
        norm: Norm,
        windows: Sequence[int],
        training: bool,
    ) -> dict[str, Tensor]:
        channels = x.shape[3]
        rows = x.numel() // channels
        outputs = {
            "dx": unwritten(x.shape, x.dtype),
            "dweight": unwritten((channels,), torch.float32),
            "dbias": unwritten((channels,), torch.float32),
        }
        workspace = unwritten((self._workspace(rows, channels),), torch.uint8)
        sizes, _ = self._sizes(x, windows)
        arguments = [DTYPES[x.dtype], training, sizes, self.multiprocessors, grad, index, x]
        arguments += [norm.vectors, norm.eps, *outputs.values()]
        self.run(
            "max_pool_backward", [*arguments, unwritten((channels,), torch.float32), workspace]
        )
        return outputs

    def _workspace(self, rows: int, channels: int) -> int:
        arguments = [rows, channels, self.multiprocessors]
        return self.run("max_pool_workspace", arguments, ctypes.c_int64)

    @staticmethod
    def _sizes(x: Tensor, windows: Sequence[int]) -> tuple[object, tuple[int, ...]]:
        batch, height, width, channels = x.shape
        kernel, stride, padding = windows
        pooled = [(side + 2 * padding - kernel) // stride + 1 for side in (height, width)]
        sizes = (batch, height, width, channels, *pooled, *windows)
        return (ctypes.c_int64 * len(sizes))(*sizes), (batch, *pooled, channels)


class AvgPoolKernels(Emulator):
    """csrc/cuda/avg_pool.cuh on [N, H, W, C] tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self.multiprocessors = 2

    def forward(self, x: Tensor) -> Tensor:
        """[N, C]."""
        out = unwritten((x.shape[0], x.shape[3]), x.dtype)
        self.run("global_avg_pool", [*self._sizes(x.dtype, x.shape), x, out])
        return out

    def backward(self, grad: Tensor, height: int, width: int) -> Tensor:
        """[N, H, W, C] of ``grad`` [N, C]."""
        batch, channels = grad.shape
        dx = unwritten((batch, height, width, channels), grad.dtype)
        self.run("global_avg_pool_backward", [*self._sizes(grad.dtype, dx.shape), grad, dx])
        return dx

    def _sizes(self, dtype: torch.dtype, shape: Sequence[int]) -> list[object]:
        return [DTYPES[dtype], (ctypes.c_int64 * 4)(*shape), self.multiprocessors]
