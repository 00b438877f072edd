# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda/conv.cpp and its graphs on CPU tensors, with a stand-in for cuDNN."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from . import CSRC, HERE, compiler, made

STAND_IN = HERE / "cudnn"
SOURCES = ("conv", "conv_graphs", "cudnn_graph", "cudnn_api")
WRAPPED = (  # the calls of theirs that host.cpp answers
    "dlopen",
    "aoti_torch_library_init_impl",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
)
OPERATORS = (
    "conv_sums",
    "conv_dgrad_add",
    "bn_relu_conv_dgrad",
    "bn_add_relu_conv_dgrad",
    "conv_engine",
    "cudnn_version",
)
TORCH = Path(torch.__file__).parent


class Mistake(NamedTuple):
    """A change of the text of one file of csrc/cuda."""

    file: str
    right: str
    wrong: str


class Cudnn:
    """The stand-in for cuDNN."""

    def __init__(self, cache: Path) -> None:
        source = STAND_IN / "cudnn.cpp"
        command = [*compiler("-O1"), "-shared", f"-I{CSRC}", str(source)]
        inputs = [source, *STAND_IN.glob("*.h"), CSRC / "cuda" / "cudnn_api.h"]
        self.file = made(cache / "cudnn.so", command, inputs)
        self.library = ctypes.CDLL(str(self.file))

    @contextmanager
    def set(self, **settings: int) -> Iterator[None]:
        """Sets variables of cudnn.cpp, which are zero otherwise."""
        for name, value in settings.items():
            self._variable(name).value = value
        try:
            yield
        finally:
            for name in settings:
                self._variable(name).value = 0

    @property
    def stream(self) -> int | None:
        """That of the last execution."""
        return ctypes.c_void_p.in_dll(self.library, "stand_in_stream").value

    @property
    def descriptors(self) -> int:
        """How many there are."""
        return self.library.stand_in_descriptors()

    def _variable(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self.library, f"stand_in_{name}")


def build(cache: Path, name: str, mistake: Mistake | None = None) -> Path:
    """A library with the operators of csrc/cuda/conv.cpp, to be registered in the namespace
    ``name``; ``mistake`` is made in one of its sources."""
    headers = [*STAND_IN.glob("*.h"), *CSRC.glob("*.h"), *CSRC.glob("cuda/*.h")]
    # USE_CUDA: torch then declares its function for streams. Some mistakes leave names unused.
    command = [*compiler("-O0"), "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    command += [f"-I{STAND_IN}", f"-I{CSRC}", "-isystem", str(TORCH / "include"), "-c"]

    def compiled(file: str) -> Path:
        source = CSRC / "cuda" / f"{file}.cpp"
        if mistake is not None and mistake.file == source.name:
            source = _with_mistake(cache, source, mistake)
        return made(cache / f"{file}.o", [*command, str(source)], [source, *headers])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    host = STAND_IN / "host.cpp"
    link = [*compiler("-O0"), f'-DSTAND_IN_NAMESPACE="{name}"', f"-I{STAND_IN}", str(host)]
    link += [*map(str, objects), "-shared", *(f"-Wl,--wrap={function}" for function in WRAPPED)]
    # libtorch.so is small and brings the others along.
    link += [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ldl"]
    return made(cache / f"{name}.so", link, [host, *headers, *objects])


def _with_mistake(cache: Path, source: Path, mistake: Mistake) -> Path:
    text = source.read_text()
    assert mistake.right in text, f"{source.name} no longer has {mistake.right!r}"
    text = text.replace(mistake.right, mistake.wrong)
    copy = cache / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    copy.write_text(text)
    return copy


class Convolutions:
    """The operators of a library that :func:`build` made; ``cudnn`` is the library that they find
    as cuDNN's."""

    def __init__(self, library: Path, name: str, cudnn: Path) -> None:
        self._definition = torch.library.Library(name, "DEF")
        for operator in OPERATORS:
            schema = str(getattr(torch.ops.fastresnet, operator).default._schema)
            self._definition.define(schema.removeprefix("fastresnet::"))
        self._library = ctypes.CDLL(str(library))
        self.operators = getattr(torch.ops, name)
        self.find(cudnn)

    def find(self, cudnn: Path) -> None:
        """Makes ``cudnn`` what is found, unless something was."""
        self._cudnn = str(cudnn).encode()
        ctypes.c_char_p.in_dll(self._library, "stand_in_cudnn").value = self._cudnn

    def use_stream(self, stream: int) -> None:
        """Makes ``stream`` torch's current one."""
        ctypes.c_void_p.in_dll(self._library, "stand_in_current_stream").value = stream

    @property
    def memset_stream(self) -> int | None:
        """That of the last memset."""
        return ctypes.c_void_p.in_dll(self._library, "stand_in_memset_stream").value
