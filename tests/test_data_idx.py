# SPDX-License-Identifier: Apache-2.0
"""The IDX reader, on intact files and on every kind of damage."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fastresnet.data import DatasetError
from fastresnet.data.datasets.idx import read_idx


def idx_bytes(values: np.ndarray, *, type_code: int = 8) -> bytes:
    header = bytes((0, 0, type_code, values.ndim))
    return header + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


VALUES = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images-idx3-ubyte"


def test_reads_plain_and_gzip_whatever_the_name(path: Path) -> None:
    for content in (idx_bytes(VALUES), gzip.compress(idx_bytes(VALUES))):
        path.write_bytes(content)
        read = read_idx(path, ndim=3)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, VALUES)
        assert read.flags.writeable


def test_reads_a_file_of_no_images(path: Path) -> None:
    path.write_bytes(idx_bytes(VALUES[:0]))
    assert read_idx(path, ndim=3).shape == (0, 3, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number 00 00 08 03 .*got nothing"),
        (b"<html>404</html>", "magic number 00 00 08 03 .*got 3c 68 74 6d"),
        (idx_bytes(VALUES, type_code=0x0D), "magic number 00 00 08 03 .*got 00 00 0d 03"),
        (idx_bytes(VALUES.reshape(-1)), "magic number 00 00 08 03 .*got 00 00 08 01"),
        (idx_bytes(VALUES)[:9], "expected 3 dimensions, got 5 bytes"),
        (idx_bytes(VALUES)[:-1], r"expected 30 values for the dimensions \[2, 3, 5\], got 29"),
        (idx_bytes(VALUES) + b"\0", r"expected 30 values for the dimensions \[2, 3, 5\], got more"),
        (
            bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"\1\2",
            "expected 79228162458924105385300197375 values .* got 2",
        ),
        (gzip.compress(idx_bytes(VALUES))[:-9], "expected an intact gzip file"),
        (gzip.compress(idx_bytes(VALUES))[:4], "expected an intact gzip file"),
    ],
    ids=[
        "empty",
        "html",
        "float32",
        "labels",
        "short_header",
        "one_short",
        "one_long",
        "huge_dimensions",
        "gzip_cut",
        "gzip_header_cut",
    ],
)
def test_damage_is_named_with_file_expected_and_got(
    path: Path, content: bytes, message: str
) -> None:
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        read_idx(path, ndim=3)
    assert str(path) in str(error.value)


def test_a_flipped_bit_in_gzip_data_is_seen(path: Path) -> None:
    content = bytearray(gzip.compress(idx_bytes(VALUES)))
    content[-5] ^= 0x10  # in the checksum of the content
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="intact gzip"):
        read_idx(path, ndim=3)
