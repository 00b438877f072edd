# SPDX-License-Identifier: Apache-2.0
"""CIFAR's pickled batches, read without running anything, and written as they were published.

A pickle may name any function to be called while it is read. Here a name yields a record of what
would have been called, and nothing is called: numpy's arrays are made from such records.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastresnet.data.datasets.errors import DatasetError

# numpy 2 writes numpy._core where the published files say numpy.core.
_ARRAY, _DTYPE, _ENCODE = (
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
)
_KNOWN = (_ARRAY, _DTYPE, _ENCODE, ("numpy", "ndarray"))


class _Call:
    """A call that was not made: its function's name, arguments, and the state set afterwards."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: tuple[str, str], arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Name:
    """Stands for a function or class of that name; calling it records the call."""

    __slots__ = ("_name",)

    def __init__(self, name: tuple[str, str]) -> None:
        self._name = name

    def __call__(self, *arguments: Any) -> _Call:
        return _Call(self._name, arguments)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Name:
        full = module.replace("numpy._core", "numpy.core"), name
        if full not in _KNOWN:
            raise pickle.UnpicklingError(f"a call of {module}.{name}")
        return _Name(full)


def load_batch(content: bytes, path: Path) -> dict[str, Any]:
    """The dictionary that ``content``, read from ``path``, is the pickle of.

    Returns:
        Its values by name: lists and numbers as they are, text as str, arrays as uint8 ndarray.

    Raises:
        DatasetError: the content is damaged, or holds anything but plain values and byte arrays.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise pickle.UnpicklingError(f"a {type(batch).__name__}")
        return {_text(key): _plain(value) for key, value in batch.items()}
    except Exception as error:
        # Damaged pickles raise almost anything.
        raise DatasetError.at(
            path, f"expected a pickled dictionary of plain values and byte arrays, got: {error}"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value] if value and isinstance(value[0], bytes) else value
    if isinstance(value, bytes):
        return _text(value)
    return _array(value) if isinstance(value, _Call) else value


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _array(call: _Call) -> np.ndarray:
    if call.name != _ARRAY:
        raise pickle.UnpicklingError(f"a call of {'.'.join(call.name)}")
    _, shape, dtype, column_major, values = call.state
    if dtype.name != _DTYPE or _text(dtype.arguments[0]) != "u1":
        raise pickle.UnpicklingError("an array of other values than bytes")
    if isinstance(values, _Call) and values.name == _ENCODE:  # Python 3, in protocols before 3
        values = values.arguments[0].encode("latin1")
    return np.frombuffer(values, np.uint8).reshape(shape, order="F" if column_major else "C")


def dump_batch(batch: Mapping[str, str | int | list[int] | list[str] | np.ndarray]) -> bytes:
    """Pickles a dictionary as Python 2 did, so that every reader of the published files reads it.

    Text becomes Python 2's byte strings, which ``pickle.load`` gives as ``bytes`` or ``str``, as
    its ``encoding`` says. Arrays are uint8.
    """
    items = b"".join(_dumped(key) + _dumped(value) for key, value in batch.items())
    content = pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    return pickle.PROTO + b"\x02" + content + pickle.STOP


def _dumped(
    value: str | int | list[Any] | tuple[Any, ...] | bool | bytes | np.ndarray | None,
) -> bytes:
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            return pickle.BININT + struct.pack("<i", value)
        case bytes():
            return pickle.BINSTRING + struct.pack("<i", len(value)) + value
        case str():
            return _dumped(value.encode())
        case list():
            items = b"".join(map(_dumped, value))
            return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS
        case tuple():
            return pickle.MARK + b"".join(map(_dumped, value)) + pickle.TUPLE
        case np.ndarray():
            dtype = _named(_DTYPE) + _dumped(("u1", 0, 1)) + pickle.REDUCE
            dtype += _dumped((3, "|", None, None, None, -1, -1, 0)) + pickle.BUILD
            empty = pickle.MARK + _named(("numpy", "ndarray")) + _dumped((0,)) + _dumped("b")
            state = _dumped(1) + _dumped(value.shape) + dtype + _dumped(False)
            state = pickle.MARK + state + _dumped(value.tobytes()) + pickle.TUPLE
            return _named(_ARRAY) + empty + pickle.TUPLE + pickle.REDUCE + state + pickle.BUILD
        case _:
            raise TypeError(f"expected plain values and byte arrays, got {type(value).__name__}")


def _named(name: tuple[str, str]) -> bytes:
    return pickle.GLOBAL + "\n".join((*name, "")).encode()
