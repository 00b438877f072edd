# SPDX-License-Identifier: Apache-2.0
"""What an image file says of itself before its pixels: format, size, orientation.

Files are told apart by content, never by name. JPEG headers are read here, in microseconds; Pillow
reads the others.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

MAX_PIXELS = 178_956_970
"""The largest image, as in Pillow: a header of a few bytes must not ask for all memory."""

Kind = Literal["missing", "empty", "truncated", "corrupt", "not an image", "unsupported"]

# By class and not by `Image.open`, which asks every reader that Pillow has.
_READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "pnm": PpmImagePlugin.PpmImageFile,
}
_MAGIC = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"BM": "bmp",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    **{b"P%d" % digit: "pnm" for digit in range(1, 7)},
}
_UNSUPPORTED_MAGIC = {
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"8BPS": "Photoshop",
}

EXIF_PREFIX = b"Exif\0\0"
_ORIENTATION, _SHORT = 0x0112, 3

# JPEG's markers (ITU-T T.81, table B.1), without their 0xff.
SOS, APP1 = 0xDA, 0xE1
HUFFMAN_SEQUENTIAL, HUFFMAN_PROGRESSIVE = (0xC0, 0xC1), (0xC2,)
ARITHMETIC = (0xC9, 0xCA)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_MAX_SCANS = 500  # as TurboJPEG's own limit: each scan costs a pass over the image


class ImageError(ValueError):
    """One file that cannot be used.

    The message does not name the file, which only callers know: they put it in front.

    Args:
        message: what was expected and what came.
        kind: the sort of fault.
    """

    def __init__(self, message: str, *, kind: Kind) -> None:
        super().__init__(message)
        self.kind: Kind = kind

    def __reduce__(self) -> tuple[Callable[[str], ImageError], tuple[str]]:
        return functools.partial(type(self), kind=self.kind), (str(self),)


@dataclass(frozen=True, slots=True)
class Header:
    """What an image file says of itself.

    Attributes:
        width: in pixels, as stored.
        height: in pixels, as stored.
        orientation: EXIF's, 1 to 8, and 1 where there is none or none that is valid. 1 for TIFF
            too, whose orientation Pillow applies: size and pixels are upright there.
        format: "jpeg", "png", "bmp", "gif", "tiff", "webp" or "pnm".
        mode: Pillow's name for the colours as stored: "L", "RGB", "CMYK", "P", "RGBA", "I;16", ...
    """

    width: int
    height: int
    orientation: int
    format: str
    mode: str

    @property
    def upright_width(self) -> int:
        """The width with the orientation applied."""
        return self.height if self.orientation >= 5 else self.width

    @property
    def upright_height(self) -> int:
        """The height with the orientation applied."""
        return self.width if self.orientation >= 5 else self.height


def read_header(data: bytes) -> Header:
    """Reads size, orientation, format and mode, without decoding pixels.

    Raises:
        ImageError: these bytes are no image, or none that can be decoded, as far as that shows
            before the pixels.
    """
    format = _format(data)
    if format == "jpeg":
        header = _read_jpeg(data)
    else:
        with open_with_pillow(data, format) as image:
            header = Header(
                image.width, image.height, _orientation(data, format, image), format, image.mode
            )
    if header.width * header.height > MAX_PIXELS:
        raise ImageError(
            f"expected at most {MAX_PIXELS} pixels, got {header.width}x{header.height}",
            kind="unsupported",
        )
    return header


@contextmanager
def open_with_pillow(data: bytes, format: str) -> Iterator[ImageFile.ImageFile]:
    """Opens a file with Pillow's reader of ``format``; any fault within is an :class:`ImageError`,
    only ``MemoryError`` being left as it is."""
    try:
        with _READERS[format](io.BytesIO(data)) as image:
            yield image
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes readers stumble in every way there is
        kind = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise ImageError(f"expected an intact {format} file, got: {error}", kind=kind) from error


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Walks a JPEG's segments up to the header of its first scan, which is the last one.

    Yields:
        The marker, and where its content begins and ends.

    Raises:
        ImageError: there is something else between them, or no scan.
    """
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] == marker == 0xFF:  # markers may be padded by any number of these
            position += 1
            continue
        begin = position + 4
        end = begin - 2 + int.from_bytes(data[position + 2 : begin], "big")
        if data[position] != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or end < begin:
            raise ImageError(
                "expected a segment of a JPEG header, got "
                f"{data[position:begin].hex(' ')} at byte {position}",
                kind="corrupt",
            )
        if end > len(data):
            break
        yield marker, begin, end
        if marker == SOS:
            return
        position = end
    raise ImageError(
        f"expected a JPEG header, got the end of the file after {len(data)} bytes",
        kind="truncated",
    )


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Walks a PNG's chunks up to its last.

    Yields:
        The type, and where the content begins and ends; its checksum is in the next four bytes.

    Raises:
        ImageError: the file ends before its last chunk does.
    """
    position, type = 8, b""
    while type != b"IEND":
        begin = position + 8
        end = begin + int.from_bytes(data[position : position + 4], "big")
        position = end + 4
        if begin > len(data) or position > len(data):
            raise ImageError(
                f"expected a whole PNG file, got its end after {len(data)} bytes",
                kind="truncated",
            )
        type = data[begin - 4 : begin]
        yield type, begin, end


def _format(data: bytes) -> str:
    if not data:
        raise ImageError("expected an image, got no bytes", kind="empty")
    for magic, format in _MAGIC.items():
        if data.startswith(magic):
            return format
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    expected = f"expected {', '.join(_READERS)}"
    for magic, name in _UNSUPPORTED_MAGIC.items():
        if data.startswith(magic):
            raise ImageError(f"{expected}, got {name}", kind="unsupported")
    if data[4:8] == b"ftyp":  # HEIC, AVIF and films
        raise ImageError(
            f"{expected}, got {data[8:12].decode('latin-1')!r}",
            kind="unsupported",
        )
    raise ImageError(f"{expected}, got {data[:12]!r}", kind="not an image")


def _read_jpeg(data: bytes) -> Header:
    exif, frame, scan = None, None, 0
    for marker, begin, end in jpeg_segments(data):
        if marker == APP1 and exif is None and data.startswith(EXIF_PREFIX, begin):
            exif = data[begin + len(EXIF_PREFIX) : end]
        elif marker in _FRAMES and frame is None:
            frame = (marker, data[begin:end])
        elif marker == SOS:
            scan = begin
    if frame is None or len(frame[1]) < 6 or len(frame[1]) != 6 + 3 * frame[1][5]:
        raise ImageError("expected a JPEG header with a frame, got none", kind="corrupt")
    marker, (precision, height, width, channels) = frame[0], struct.unpack_from(">BHHB", frame[1])
    if marker not in (*HUFFMAN_SEQUENTIAL, *HUFFMAN_PROGRESSIVE, *ARITHMETIC):
        raise ImageError(
            f"expected a sequential or progressive JPEG, got SOF{marker - 0xC0}",
            kind="unsupported",
        )
    if precision != 8 or channels not in _JPEG_MODES or not width or not height:
        raise ImageError(
            "expected a JPEG of 8 bits, 1, 3 or 4 channels and a size, got "
            f"{precision} bits, {channels} channels and {width}x{height}",
            kind="unsupported",
        )
    one_scan = marker in HUFFMAN_SEQUENTIAL and data[scan] == channels
    if not one_scan and (scans := data.count(b"\xff\xda", scan) + 1) > _MAX_SCANS:
        raise ImageError(
            f"expected at most {_MAX_SCANS} scans in a JPEG, got {scans}", kind="unsupported"
        )
    return Header(width, height, _exif_orientation(exif or b""), "jpeg", _JPEG_MODES[channels])


def _orientation(data: bytes, format: str, image: ImageFile.ImageFile) -> int:
    exif = b""
    if format == "png":  # Pillow does not see what stands behind the pixels
        exif = next(
            (data[begin:end] for type, begin, end in png_chunks(data) if type == b"eXIf"), b""
        )
    elif format == "webp":
        exif = image.info.get("exif", b"").removeprefix(EXIF_PREFIX)
    return _exif_orientation(exif)


def _exif_orientation(exif: bytes) -> int:
    """The orientation in the first directory of ``exif``, which is laid out like a TIFF file."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, type, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == _ORIENTATION:
                return value if type == _SHORT and 1 <= value <= 8 else 1
    except struct.error:  # it is cut short
        pass
    return 1
