# SPDX-License-Identifier: Apache-2.0
"""The bytes of one image file to pixels, with one rule for every odd file in every backend.

libjpeg-turbo decodes JPEGs, through ``simplejpeg``; Pillow decodes CMYK and everything else. Of
several frames the first counts. Grey, palettes and CMYK become RGB, alpha is dropped, 16 bits are
shifted down to 8.

- A JPEG that libjpeg warns of is ``corrupt``: it is all that can be known of flipped bits. One that
  ends early is ``truncated``, unless nothing but its last marker is missing or, where a single scan
  holds it all, 95 % of its lines are there.
- Without ``simplejpeg``, and for a subsampling that TurboJPEG does not know, Pillow decodes JPEGs
  too: it does not tell of warnings, and takes no early end.
- A PNG must have right checksums and an end.
- Nothing but :class:`ImageError` comes out for any bytes, while memory lasts: ``MemoryError`` says
  nothing about a file.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from fastresnet.data.image_header import (
    APP1,
    ARITHMETIC,
    EXIF_PREFIX,
    HUFFMAN_PROGRESSIVE,
    HUFFMAN_SEQUENTIAL,
    MAX_PIXELS,
    SOS,
    Header,
    ImageError,
    Kind,
    jpeg_segments,
    open_with_pillow,
    png_chunks,
    read_header,
)

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

__all__ = [
    "MAX_PIXELS",
    "Header",
    "ImageError",
    "Kind",
    "as_plain",
    "decode",
    "decoded_size",
    "read_header",
    "reduction",
    "upright",
    "verify",
]

_log = logging.getLogger("fastresnet.data")

_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_BLOCK = 8  # pixels a side of what JPEG transforms
_EOI = b"\xff\xd9"
_ENOUGH_LINES = 0.95


def decode(
    data: bytes,
    header: Header | None = None,
    *,
    min_size: tuple[int, int] | None = None,
    buffer: np.ndarray | None = None,
) -> np.ndarray:
    """Decodes a file to uint8 [height, width, 4]: red, green, blue and 255, contiguous.

    The pixels are as stored: :func:`upright` applies the orientation. They take four bytes so that
    one load fetches one; libjpeg writes them as fast as three. Other threads run meanwhile.

    Args:
        header: what :func:`read_header` said of ``data``, if it is known.
        min_size: the (height, width) that suffice, as stored: a JPEG is then decoded at a scale of
            1 / :func:`reduction`, in less time.
        buffer: uint8, of at least as many bytes as the result: the memory of which the result is a
            view, where libjpeg writes it. Fresh memory for each image costs its pages each time.

    Raises:
        ImageError: the file cannot be used; ``buffer`` is undefined.
    """
    header = read_header(data) if header is None else header
    return _decode(data, header, reduction(header, min_size), buffer)


def decoded_size(header: Header, min_size: tuple[int, int] | None) -> tuple[int, int]:
    """The height and width of what :func:`decode` returns."""
    return _reduced(header, reduction(header, min_size))


def reduction(header: Header, min_size: tuple[int, int] | None) -> int:
    """What :func:`decode` divides both sides by, rounding up: 1, for JPEGs also 2, 4 or 8.

    Pixel (y, x) of the result stands for the stored pixels from that many times (y, x) on. libjpeg
    has other scales too, but vector instructions for these only.

    Args:
        min_size: the (height, width) that the result must have, as far as the file has them.
    """
    if min_size is None:
        return 1
    if min(min_size) < 1:
        raise ValueError(f"expected a height and a width of at least 1, got {min_size}")
    # Of less than a block, simplejpeg takes another scale that gives the same size.
    if header.format != "jpeg" or min(header.height, header.width) < _BLOCK:
        return 1
    for scale in (8, 4, 2):
        height, width = _reduced(header, scale)
        if height >= min(min_size[0], header.height) and width >= min(min_size[1], header.width):
            return scale
    return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation (1 to 8) to pixels [height, width, channels] as stored.

    Returns:
        The upright image, contiguous; ``pixels`` themselves where nothing is to be done.
    """
    if not 1 <= orientation <= 8:
        raise ValueError(f"expected an orientation in 1..8, got {orientation}")
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def verify(data: bytes) -> Header:
    """Raises what :func:`decode` would, but decodes a JPEG at an eighth of its size only.

    Raises:
        ImageError: the file cannot be used.
    """
    header = read_header(data)
    _decode(data, header, 8 if header.format == "jpeg" else 1)
    return header


def as_plain(data: bytes, header: Header) -> bytes:
    """The same image for a decoder with rules of its own (DALI), of a kind that needs none.

    A grey or RGB JPEG keeps its scans, gets the last marker that it may lack, and has its EXIF data
    replaced by the orientation alone: DALI 2.4 writes past its memory where two EXIF segments
    differ. A plain PNG stays as it is. All else is decoded, turned upright, and becomes a TIFF
    without compression, which DALI decodes fastest.

    Args:
        data: a file that :func:`verify` accepts.
        header: what :func:`verify` said of it.

    Raises:
        ImageError: the file had to be decoded, and cannot be.
    """
    if header.format == "jpeg" and header.mode in ("L", "RGB"):
        plain = _plain_jpeg(data, header.orientation)
        if plain is not None:
            return plain
    if header.format == "png" and _is_plain_png(data, header):
        return data
    pixels = upright(decode(data, header), header.orientation)
    file = io.BytesIO()
    image = Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels, "raw", "RGBX")
    image.save(file, "TIFF")
    return file.getvalue()


def _reduced(header: Header, scale: int) -> tuple[int, int]:
    return math.ceil(header.height / scale), math.ceil(header.width / scale)


def _decode(
    data: bytes, header: Header, scale: int, buffer: np.ndarray | None = None
) -> np.ndarray:
    if header.format == "jpeg" and simplejpeg is not None:
        return _decode_turbo(data, header, scale, buffer)
    if header.format == "jpeg":
        _say_that_simplejpeg_is_missing()
    if header.format == "png":
        _check_png(data)
    return _decode_pillow(data, header, scale)


@functools.cache
def _say_that_simplejpeg_is_missing() -> None:
    _log.warning(
        "simplejpeg is not installed: Pillow decodes JPEGs, slower, and sees less damage "
        "(pip install simplejpeg)"
    )


def _decode_turbo(data: bytes, header: Header, scale: int, buffer: np.ndarray | None) -> np.ndarray:
    options: dict[str, Any] = {
        "colorspace": "CMYK" if header.mode == "CMYK" else "RGBX",
        "buffer": buffer,
    }
    if scale > 1:
        options["min_height"], options["min_width"] = _reduced(header, scale)
    try:
        pixels = _turbo(data, **options)
    except ImageError as error:
        reason = str(error)
        if "Could not determine subsampling" in reason:
            return _decode_pillow(data, header, scale)
        frame = _frame(data)
        if "Premature end of JPEG file" in reason and _holds_enough(data, frame):
            data += _EOI
            pixels = _turbo(data, strict=False, **options)
        elif _EOI in data[frame.scan :]:
            raise
        else:
            raise ImageError(reason, kind="truncated") from error
    return _decode_pillow(data, header, scale) if header.mode == "CMYK" else pixels


def _turbo(data: bytes, **options: Any) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, **options)
    except ValueError as error:
        raise ImageError(f"expected an intact jpeg file, got: {error}", kind="corrupt") from error


@dataclass(frozen=True)
class _Frame:
    """A JPEG's frame marker and where in the file its content and its first scan's begin."""

    marker: int
    begin: int
    scan: int


def _frame(data: bytes) -> _Frame:
    places = {marker: begin for marker, begin, _ in jpeg_segments(data)}
    marker = next(
        marker
        for marker in (*HUFFMAN_SEQUENTIAL, *HUFFMAN_PROGRESSIVE, *ARITHMETIC)
        if marker in places
    )
    return _Frame(marker, places[marker], places[SOS])


def _holds_enough(data: bytes, frame: _Frame) -> bool:
    """Whether a JPEG that ends early lacks its last marker only, or few lines of its only scan."""
    channels = data[frame.begin + 5]
    whole = data + _EOI
    if frame.marker in HUFFMAN_SEQUENTIAL and data[frame.scan] == channels:
        # libjpeg is told that there are fewer lines: does it find enough, or even too many?
        lines = int.from_bytes(data[frame.begin + 1 : frame.begin + 3], "big")
        enough = math.ceil(_ENOUGH_LINES * lines).to_bytes(2, "big")
        warning = _warning(whole[: frame.begin + 1] + enough + whole[frame.begin + 3 :])
        return warning is None or "extraneous bytes" in warning
    # The end of arithmetic coding does not show, so libjpeg does not warn of it.
    return frame.marker not in ARITHMETIC and _is_refined(data, frame) and _warning(whole) is None


def _is_refined(data: bytes, frame: _Frame) -> bool:
    """Whether the scans bring every coefficient of every channel to full precision."""
    channels = data[frame.begin + 5]
    names = data[frame.begin + 6 : frame.begin + 6 + 3 * channels : 3]
    missing = {(name, coefficient) for name in names for coefficient in range(_BLOCK * _BLOCK)}
    begin = frame.scan
    while begin < len(data):
        end = begin + 1 + 2 * data[begin]
        first, last, precision = data[end : end + 3].ljust(3, b"\xff")
        if precision & 0xF == 0:
            missing -= {
                (name, coefficient)
                for name in data[begin + 1 : end : 2]
                for coefficient in range(first, last + 1)
            }
        following = data.find(b"\xff" + bytes([SOS]), end)
        begin = following + 4 if following >= 0 else len(data)
    return not missing


def _warning(data: bytes) -> str | None:
    try:
        _turbo(data, min_height=1, min_width=1)
    except ImageError as error:
        return str(error)
    return None


def _decode_pillow(data: bytes, header: Header, scale: int) -> np.ndarray:
    with open_with_pillow(data, header.format) as image:
        if scale > 1:
            image.draft(image.mode, (max(image.width // scale, 1), max(image.height // scale, 1)))
        image.load()
        pixels = _rgbx(image, header.format)
    if scale == 1 and pixels.shape[:2] != (header.height, header.width):
        raise ImageError(
            f"expected {header.width}x{header.height} pixels as the header says, got "
            f"{pixels.shape[1]}x{pixels.shape[0]}",
            kind="corrupt",
        )
    return pixels


def _rgbx(image: ImageFile.ImageFile, format: str) -> np.ndarray:
    # Pillow's own conversion of 16 bits makes white of all that is above 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("png", "pnm")):
        grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.array(grey.convert("RGB").convert("RGBX"))
    if image.mode not in _MODES:
        raise ImageError(
            f"expected pixels of 8 or 16 bits, got Pillow's mode {image.mode}", kind="unsupported"
        )
    image.info.pop("transparency", None)  # alpha is dropped, and Pillow would warn of it
    return np.array(image.convert("RGB").convert("RGBX"))


def _check_png(data: bytes) -> None:
    """Pillow leaves the checksums of the pixels alone."""
    view = memoryview(data)
    for type, begin, end in png_chunks(data):
        if zlib.crc32(view[begin - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ImageError(
                f"expected the checksum of a png file's chunk {type!r} to be right, got another",
                kind="corrupt",
            )


def _is_plain_png(data: bytes, header: Header) -> bool:
    depth = data[24]
    return (
        header.mode in ("L", "RGB", "RGBA")
        and depth == 8
        and all(type != b"eXIf" for type, _, _ in png_chunks(data))
    )


def _plain_jpeg(data: bytes, orientation: int) -> bytes | None:
    """None for arithmetic coding, which other decoders need not know."""
    view = memoryview(data)
    parts = [b"\xff\xd8", _exif(orientation) if orientation > 1 else b""]
    for marker, begin, end in jpeg_segments(data):
        if marker in ARITHMETIC:
            return None
        if marker != APP1 or not data.startswith(EXIF_PREFIX, begin):
            parts.append(view[begin - 4 : end])
    parts.append(view[end:])
    parts.append(b"" if data.endswith(_EOI) else _EOI)
    return b"".join(parts)


def _exif(orientation: int) -> bytes:
    """A JPEG segment with a directory of one entry: tag, type (short), count, value."""
    directory = struct.pack("<4sIHHHIHHI", b"II*\0", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    content = EXIF_PREFIX + directory
    return struct.pack(">BBH", 0xFF, APP1, 2 + len(content)) + content
