# SPDX-License-Identifier: Apache-2.0
"""Reads IDX, the format of MNIST and its relatives, plain or gzip-compressed.

A file is two zero bytes, a type code, the number of dimensions, each dimension as a big-endian
32-bit integer, then the values, last dimension fastest.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastresnet.data.datasets.errors import DatasetError

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Reads an IDX file of bytes.

    Args:
        path: the file; compression is told from its content, not from its name.
        ndim: the number of dimensions the file must have (1 for labels, 3 for grey images).

    Returns:
        A writable uint8 array with ``ndim`` dimensions.

    Raises:
        DatasetError: the file is not IDX, holds another type or number of dimensions, or is
            shorter or longer than its header says.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        compressed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        file.seek(0)
        if not compressed:
            return _parse(file, path, ndim)
        try:
            with gzip.open(file) as stream:
                return _parse(stream, path, ndim)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DatasetError.at(path, f"expected an intact gzip file, got: {error}") from error


def _parse(stream: BinaryIO | gzip.GzipFile, path: Path, ndim: int) -> np.ndarray:
    magic = stream.read(4)
    expected = bytes((0, 0, _UINT8, ndim))
    if magic != expected:
        raise DatasetError.at(
            path,
            f"expected the IDX magic number {expected.hex(' ')} "
            f"(bytes, {ndim} dimension{'s' if ndim > 1 else ''}), "
            f"got {magic.hex(' ') or 'nothing'}",
        )
    header = stream.read(4 * ndim)
    if len(header) != 4 * ndim:
        raise DatasetError.at(path, f"expected {ndim} dimensions, got {len(header)} bytes of them")
    shape = tuple(int(size) for size in np.frombuffer(header, dtype=">u4"))
    count = int(np.prod(shape, dtype=object))
    # Read in pieces: a damaged header may promise far more than there is, or than memory holds.
    values = bytearray()
    while len(values) <= count and (piece := stream.read(min(count + 1 - len(values), 1 << 24))):
        values += piece
    if len(values) != count:
        got = f"{len(values)}" if len(values) < count else "more"
        raise DatasetError.at(
            path, f"expected {count} values for the dimensions {list(shape)}, got {got}"
        )
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
