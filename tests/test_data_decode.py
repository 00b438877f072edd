# SPDX-License-Identifier: Apache-2.0
"""Decoding: every odd kind of file has one outcome, and ordinary ones give Pillow's very pixels."""

from __future__ import annotations

import io
import logging
import math
import pickle
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastresnet.data import decode as decoding
from fastresnet.data.decode import (
    Header,
    ImageError,
    as_plain,
    decode,
    decoded_size,
    read_header,
    reduction,
    upright,
    verify,
)

HEIGHT, WIDTH = 120, 152


def photo(height: int = HEIGHT, width: int = WIDTH, *, noise: int = 12) -> np.ndarray:
    """uint8 [height, width, 3] with gradients and noise, and no symmetry."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) % 256], axis=-1)
    rough = smooth + np.random.default_rng(0).integers(-noise, noise + 1, smooth.shape)
    return rough.clip(0, 255).astype(np.uint8)


PHOTO = photo()
GREY = PHOTO[..., 0]
ALPHA = PHOTO[..., 2]
DEEP = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 3 % 65536).astype(np.uint16)


def encode(image: np.ndarray | Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, format, **options)
    return file.getvalue()


def pillow(data: bytes) -> np.ndarray:
    """What Pillow makes of it, upright: [height, width, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def png(pixels: np.ndarray, colour_type: int, *extra: bytes) -> bytes:
    """A PNG of a kind that Pillow does not write. ``extra`` chunks go behind the pixels."""
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(len(pixels), -1)
    scanlines = b"".join(b"\0" + row.tobytes() for row in rows)
    size = struct.pack(">II", pixels.shape[1], pixels.shape[0])
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", size + bytes((8 * pixels.itemsize, colour_type, 0, 0, 0))),
            chunk(b"IDAT", zlib.compress(scanlines)),
            *extra,
            chunk(b"IEND", b""),
        )
    )


def chunk(type: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(type + content)
    return struct.pack(">I", len(content)) + type + content + struct.pack(">I", checksum)


def exif(orientation: int, *, order: str = "<", type: int = 3) -> bytes:
    """EXIF data that says an orientation, behind another entry."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + {1: "Bxxx", 3: "Hxx", 4: "I"}[type], orientation)
    return (
        magic
        + struct.pack(order + "IH", 8, 2)
        + struct.pack(order + "HHIHxx", 0x0100, 3, 1, WIDTH)
        + struct.pack(order + "HHI", 0x0112, type, 1)
        + value
        + bytes(4)
    )


def with_exif(data: bytes, *blocks: bytes) -> bytes:
    """A JPEG with a segment in front for each block."""
    segments = [
        struct.pack(">BBH", 0xFF, 0xE1, 8 + len(block)) + b"Exif\0\0" + block for block in blocks
    ]
    return data[:2] + b"".join(segments) + data[2:]


def frame(data: bytes) -> int:
    """Where a JPEG's frame marker is."""
    return next(
        data.index(bytes((0xFF, code))) for code in (0xC0, 0xC2) if bytes((0xFF, code)) in data
    )


def patch(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def size_at(data: bytes) -> int:
    """Where in a JPEG its height and then its width are."""
    return frame(data) + 5


def scan_at(data: bytes) -> int:
    """Where in a JPEG the first scan's entropy-coded bytes are."""
    header = data.index(b"\xff\xda")
    return header + 2 + int.from_bytes(data[header + 2 : header + 4], "big")


JPEG = encode(PHOTO, quality=90)
PROGRESSIVE = encode(PHOTO, quality=90, progressive=True)
PNG = encode(PHOTO, "PNG")

# Of `cjpeg -arithmetic`: a grey ramp of 16 x 16.
ARITHMETIC = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffdb004300080606070605080707070909080a0c140d0c0b0b0c"
    "1912130f141d1a1f1e1d1a1c1c20242e2720222c231c1c2837292c30313434341f27393d38323c2e333432ffc900"
    "0b080010001001011100ffcc000600101005ffda0008010100003f00ff00b788510741 7d110be26ecf88e4eeffd9"
)


def unusual_subsampling() -> bytes:
    """A mid-grey JPEG of 24 x 8 whose luma is sampled 3 x 1, which TurboJPEG has no name for."""
    data = encode(np.full((8, 24, 3), 128, np.uint8), subsampling="4:4:4")
    data = patch(data, frame(data) + 11, b"\x31")
    # Three blocks of luma, one of each chroma; each a difference of zero and an end of block.
    bits = "001010" * 3 + "0000" * 2
    bits += "1" * (-len(bits) % 8)
    return data[: scan_at(data)] + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9"


def odd_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files that can be used, and what is to be seen in them, upright: [height, width, 3]."""
    palette = Image.fromarray(PHOTO).quantize(64)
    colours = np.asarray(palette.convert("RGB"))
    grey = np.repeat(GREY[..., None], 3, axis=2)
    deep = np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, axis=2)
    black_and_white = np.repeat(((GREY > 99) * np.uint8(255))[..., None], 3, axis=2)
    deep_colours = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=2)
    rgba = np.dstack([PHOTO, ALPHA])
    turned = np.rot90(PHOTO, -1)
    lossless = {
        "png": (PNG, PHOTO),
        "png, grey": (encode(GREY, "PNG"), grey),
        "png, 1 bit": (encode(Image.fromarray(GREY > 99), "PNG"), black_and_white),
        "png, 16-bit grey": (encode(DEEP, "PNG"), deep),
        "png, 16-bit grey and alpha": (png(np.dstack([DEEP, DEEP[::-1]]), 4), deep),
        "png, 16-bit rgb": (png(deep_colours, 2), (deep_colours >> 8).astype(np.uint8)),
        "png, rgba": (encode(rgba, "PNG"), PHOTO),
        "png, grey and alpha": (encode(np.dstack([GREY, ALPHA]), "PNG"), grey),
        "png, one colour transparent": (
            encode(PHOTO, "PNG", transparency=tuple(map(int, PHOTO[5, 5]))),
            PHOTO,
        ),
        "png, palette": (encode(palette, "PNG"), colours),
        "png, palette, one transparent": (encode(palette, "PNG", transparency=7), colours),
        "png, palette, alpha": (encode(palette, "PNG", transparency=bytes(range(64))), colours),
        "png, exif": (encode(PHOTO, "PNG", exif=b"Exif\0\0" + exif(6)), turned),
        "png, exif behind": (png(PHOTO, 2, chunk(b"eXIf", exif(6))), turned),
        "bmp": (encode(PHOTO, "BMP"), PHOTO),
        "bmp, grey": (encode(GREY, "BMP"), grey),
        "gif": (encode(palette, "GIF"), colours),
        "gif, moving, transparent": (
            encode(
                palette,
                "GIF",
                save_all=True,
                append_images=[palette.transpose(Image.Transpose.ROTATE_180)],
                transparency=3,
            ),
            colours,
        ),
        "tiff": (encode(PHOTO, "TIFF"), PHOTO),
        "tiff, lzw": (encode(PHOTO, "TIFF", compression="tiff_lzw"), PHOTO),
        "tiff, 16-bit grey": (encode(DEEP, "TIFF"), deep),
        "tiff, 16-bit grey, big-endian": (
            encode(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
            deep,
        ),
        "tiff, orientation": (encode(PHOTO, "TIFF", tiffinfo={0x0112: 6}), turned),
        "webp": (encode(PHOTO, "WEBP", lossless=True), PHOTO),
        "webp, exif": (
            encode(PHOTO, "WEBP", lossless=True, exif=b"Exif\0\0" + exif(6)),
            turned,
        ),
        "pnm": (encode(PHOTO, "PPM"), PHOTO),
        "pnm, grey": (encode(GREY, "PPM"), grey),
        "pnm, 16-bit grey": (
            b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + DEEP.astype(">u2").tobytes(),
            deep,
        ),
    }
    jpegs = {
        "jpeg": JPEG,
        "jpeg, 4:4:4": encode(PHOTO, subsampling="4:4:4"),
        "jpeg, 4:2:2": encode(PHOTO, subsampling="4:2:2"),
        "jpeg, 4:1:1": encode(PHOTO, subsampling="4:1:1"),
        "jpeg, rgb": encode(PHOTO, keep_rgb=True),
        "jpeg, grey": encode(GREY),
        "jpeg, cmyk": encode(Image.fromarray(PHOTO).convert("CMYK")),
        "jpeg, progressive": PROGRESSIVE,
        "jpeg, progressive, grey": encode(GREY, progressive=True),
        "jpeg, restarts": encode(PHOTO, restart_marker_blocks=3),
        "jpeg, arithmetic": ARITHMETIC,
        "jpeg, unusual subsampling": unusual_subsampling(),
        "jpeg, bytes behind": JPEG + b"more" * 99,
        "jpeg, exif": with_exif(JPEG, exif(6, order=">")),
        "jpeg, exif twice": with_exif(JPEG, exif(6), exif(3)),
        "jpeg, exif invalid": with_exif(JPEG, exif(9)),
    }
    seen = {name: pillow(data) for name, data in jpegs.items()}
    return lossless | {name: (data, seen[name]) for name, data in jpegs.items()}


ODD_FILES = odd_files()


@pytest.mark.parametrize("name", ODD_FILES)
def test_every_odd_kind_is_seen_as_it_should_be(name: str) -> None:
    data, expected = ODD_FILES[name]
    header = read_header(data)
    assert verify(data) == header
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (header.height, header.width, 4)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert (pixels[..., 3] == 255).all()
    seen = upright(pixels, header.orientation)
    assert seen.shape[:2] == (header.upright_height, header.upright_width)
    np.testing.assert_array_equal(seen[..., :3], expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientations_are_pillows(format: str, orientation: int, order: str) -> None:
    options: dict[str, object] = {"exif": b"Exif\0\0" + exif(orientation, order=order)}
    if format == "WEBP":
        options["lossless"] = True
    if format == "TIFF":
        options = {"tiffinfo": {0x0112: orientation}}
    data = encode(PHOTO, format, **options)
    header = read_header(data)
    assert header.orientation == (1 if format == "TIFF" else orientation)
    np.testing.assert_array_equal(upright(decode(data), header.orientation)[..., :3], pillow(data))


@pytest.mark.parametrize(
    ("blocks", "orientation"),
    [
        ([], 1),
        ([exif(0)], 1),
        ([exif(9)], 1),
        ([exif(6, type=4)], 1),
        ([exif(6, type=1)], 1),
        ([exif(6)[:-7]], 1),
        ([exif(6)[:10]], 1),
        ([b""], 1),
        ([b"II*\0\xff\xff\xff\xff"], 1),
        ([exif(3), exif(6)], 3),
        ([b"", exif(6)], 1),
    ],
)
def test_only_a_valid_orientation_in_the_first_exif_counts(
    blocks: list[bytes], orientation: int
) -> None:
    assert read_header(with_exif(JPEG, *blocks)).orientation == orientation


def test_exif_may_stand_anywhere_before_the_scan() -> None:
    padded = JPEG[:2] + b"\xff\xff\xff" + JPEG[2:]
    scan = padded.index(b"\xff\xda")
    segment = with_exif(JPEG, exif(6))[2 : 2 + 10 + len(exif(6))]
    data = padded[:scan] + segment + padded[scan:]
    assert read_header(data) == Header(WIDTH, HEIGHT, 6, "jpeg", "RGB")
    np.testing.assert_array_equal(decode(data), decode(JPEG))


def test_upright_refuses_what_is_no_orientation() -> None:
    for orientation in (0, 9):
        with pytest.raises(ValueError, match=rf"orientation in 1\.\.8, got {orientation}"):
            upright(PHOTO, orientation)


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    quality=st.integers(1, 100),
    progressive=st.booleans(),
    grey=st.booleans(),
)
def test_a_full_decode_is_pillows_bit_for_bit(
    height: int, width: int, subsampling: str, quality: int, progressive: bool, grey: bool
) -> None:
    image = photo(height, width)
    image = image[..., 0] if grey else image
    data = encode(image, subsampling=subsampling, quality=quality, progressive=progressive)
    np.testing.assert_array_equal(decode(data)[..., :3], pillow(data))


@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    least=st.tuples(st.integers(1, 210), st.integers(1, 210)),
)
def test_the_smallest_scale_that_covers_is_taken(
    height: int, width: int, least: tuple[int, int]
) -> None:
    header = Header(width, height, 1, "jpeg", "RGB")

    def covers(scale: int) -> bool:
        return math.ceil(height / scale) >= min(least[0], height) and math.ceil(
            width / scale
        ) >= min(least[1], width)

    expected = max(scale for scale in (1, 2, 4, 8) if covers(scale))
    assert reduction(header, least) == (1 if min(height, width) < 8 else expected)
    assert reduction(header, None) == 1
    assert reduction(Header(width, height, 1, "png", "RGB"), least) == 1


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(120, 152), (121, 149), (8, 9), (67, 15)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_reduced_decode_is_pillows_draft(mode: str, height: int, width: int, scale: int) -> None:
    data = encode(Image.fromarray(photo(height, width)).convert(mode))
    least = (math.ceil(height / scale), math.ceil(width / scale))
    header = read_header(data)
    pixels = decode(data, header, min_size=least)
    assert reduction(header, least) == scale
    assert pixels.shape == (*least, 4)
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (width // scale, height // scale))
        np.testing.assert_array_equal(pixels[..., :3], np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("image", [PHOTO, GREY, Image.fromarray(PHOTO).convert("CMYK")])
def test_a_decode_into_a_buffer_is_the_same(image: np.ndarray | Image.Image, scale: int) -> None:
    data = encode(image)
    least = (HEIGHT // scale, WIDTH // scale)
    header = read_header(data)
    height, width = decoded_size(header, least)
    buffer = np.full(height * width * 4 + 1000, 77, dtype=np.uint8)
    pixels = decode(data, header, min_size=least, buffer=buffer)
    assert (height, width) == least
    np.testing.assert_array_equal(pixels, decode(data, header, min_size=least))
    assert np.all(buffer[-1000:] == 77)
    if header.mode != "CMYK":  # which Pillow decodes
        assert np.shares_memory(pixels, buffer)


def test_min_size_is_checked() -> None:
    with pytest.raises(ValueError, match=r"height and a width of at least 1, got \(0, 5\)"):
        decode(JPEG, min_size=(0, 5))


def noisy_jpeg(**options: object) -> bytes:
    """One in which lines take about as many bytes everywhere."""
    noise = np.random.default_rng(1).integers(0, 256, (400, 96, 3), dtype=np.uint8)
    return encode(noise, quality=80, **options)


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": "4:4:4"}, {"restart_marker_rows": 1}, {"optimize": True}]
)
def test_a_jpeg_may_lack_its_last_marker_and_few_lines(options: dict[str, object]) -> None:
    data = noisy_jpeg(**options)
    whole = decode(data)
    length = len(data) - scan_at(data)
    for missing in (1, 2):
        np.testing.assert_array_equal(decode(data[:-missing]), whole)
    shortened = decode(data[: -round(0.02 * length)])
    np.testing.assert_array_equal(shortened[:380], whole[:380])
    assert verify(data[: -round(0.02 * length)]) == read_header(data)
    for share in (0.08, 0.5, 0.98):
        cut = data[: -round(share * length)]
        for use in (decode, verify, lambda data: decode(data, min_size=(50, 12))):
            with pytest.raises(ImageError, match="Premature end") as error:
                use(cut)
            assert error.value.kind == "truncated"


@pytest.mark.parametrize("grey", [False, True])
def test_a_progressive_jpeg_may_lack_its_last_marker_only(grey: bool) -> None:
    data = encode(GREY if grey else PHOTO, progressive=True)
    np.testing.assert_array_equal(decode(data[:-2]), decode(data))
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    # Cut between two scans, the file looks whole, only coarser.
    tables = [max(data.rfind(b"\xff\xc4", 0, at), 0) for at in scans[1:]]
    for end in (*scans[1:], *tables, len(data) - 10, len(data) // 2):
        with pytest.raises(ImageError) as error:
            decode(data[:end])
        assert error.value.kind == "truncated"


def test_arithmetic_coding_must_be_whole() -> None:
    for end in (-2, -4):
        with pytest.raises(ImageError) as error:
            decode(ARITHMETIC[:end])
        assert error.value.kind == "truncated"


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_what_libjpeg_warns_of_is_corrupt(data: bytes) -> None:
    # Bytes lost inside the scan, the end being there. It does not see the loss of a few.
    middle = (scan_at(data) + len(data)) // 2
    for lost in (100, 500):
        for use in (decode, verify):
            with pytest.raises(ImageError, match="Corrupt JPEG data") as error:
                use(data[:middle] + data[middle + lost :])
            assert error.value.kind == "corrupt"


def faulty_files() -> dict[str, tuple[bytes, str, str]]:
    """Files that cannot be used, the kind of fault, and what the message says."""
    scan = PROGRESSIVE.index(b"\xff\xda")
    one_scan = PROGRESSIVE[scan : PROGRESSIVE.index(b"\xff\xc4", scan)]
    floats = Image.fromarray(DEEP.astype(np.float32))
    lab = Image.fromarray(PHOTO).convert("RGB")
    lab = Image.frombytes("LAB", lab.size, lab.tobytes())
    last_idat = PNG.rindex(b"IEND") - 8
    return {
        "no bytes": (b"", "empty", "got no bytes"),
        "html": (b"<!DOCTYPE html><html></html>", "not an image", "got b'<!DOCTYPE ht"),
        "zeros": (bytes(4096), "not an image", "expected jpeg, png, bmp, gif, tiff, webp, pnm"),
        "one byte": (b"\xff", "not an image", r"got b'\\xff'"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image", "<svg"),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(99), "unsupported", "'heic'"),
        "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "unsupported", "JPEG 2000"),
        "jpeg, three bytes": (JPEG[:3], "truncated", "end of the file after 3 bytes"),
        "jpeg, header cut": (JPEG[:200], "truncated", "end of the file after 200 bytes"),
        "jpeg, header only": (JPEG[: scan_at(JPEG)], "truncated", "Premature end"),
        "jpeg, no frame": (
            JPEG[: frame(JPEG)] + JPEG[JPEG.index(b"\xff\xda") :],
            "corrupt",
            "with a frame, got none",
        ),
        "jpeg, bytes between segments": (JPEG[:20] + b"abc" + JPEG[20:], "corrupt", "got 61 62 63"),
        "jpeg, 12 bits": (patch(JPEG, frame(JPEG) + 4, b"\x0c"), "unsupported", "got 12 bits"),
        "jpeg, lossless": (patch(JPEG, frame(JPEG) + 1, b"\xc3"), "unsupported", "got SOF3"),
        "jpeg, hierarchical": (patch(JPEG, frame(JPEG) + 1, b"\xc5"), "unsupported", "got SOF5"),
        "jpeg, no height": (patch(JPEG, size_at(JPEG), bytes(2)), "unsupported", "got .*152x0"),
        "jpeg, bomb": (
            patch(JPEG, size_at(JPEG), struct.pack(">HH", 65500, 65500)),
            "unsupported",
            "at most 178956970 pixels, got 65500x65500",
        ),
        "jpeg, too many scans": (
            PROGRESSIVE[:scan] + one_scan * 501 + b"\xff\xd9",
            "unsupported",
            "at most 500 scans in a JPEG, got 501",
        ),
        "png, bomb": (
            patch(PNG, 8, chunk(b"IHDR", struct.pack(">II5B", 60000, 60000, 8, 2, 0, 0, 0))),
            "unsupported",
            "got 60000x60000",
        ),
        "png, half": (PNG[: len(PNG) // 2], "truncated", "expected a whole PNG file"),
        "png, no end": (PNG[:-12], "truncated", "expected a whole PNG file"),
        "png, flipped bit": (
            patch(PNG, len(PNG) // 2, bytes([PNG[len(PNG) // 2] ^ 1])),
            "corrupt",
            "checksum of a png file's chunk b'IDAT'",
        ),
        "png, wrong checksum": (
            patch(PNG, last_idat, bytes([PNG[last_idat] ^ 1])),
            "corrupt",
            "checksum",
        ),
        "bmp, half": (encode(PHOTO, "BMP")[:9999], "truncated", "truncated"),
        "gif, half": (encode(PHOTO, "GIF")[:5000], "truncated", "truncated"),
        "tiff, half": (encode(PHOTO, "TIFF")[:9999], "truncated", "truncated"),
        "pnm, half": (encode(PHOTO, "PPM")[:9999], "truncated", "truncated"),
        "webp, half": (encode(PHOTO, "WEBP")[:999], "corrupt", "expected an intact webp file"),
        "tiff, floats": (encode(floats, "TIFF"), "unsupported", "Pillow's mode F"),
        "tiff, 32 bits": (encode(DEEP.astype(np.int32), "TIFF"), "unsupported", "Pillow's mode I"),
        "tiff, lab": (encode(lab, "TIFF"), "unsupported", "Pillow's mode LAB"),
    }


FAULTY_FILES = faulty_files()


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", FAULTY_FILES)
def test_every_fault_has_its_kind(name: str) -> None:
    data, kind, message = FAULTY_FILES[name]
    for use in (decode, verify):
        with pytest.raises(ImageError, match=message) as error:
            use(data)
        assert error.value.kind == kind


def test_other_threads_run_while_a_jpeg_is_decoded() -> None:
    data = encode(np.tile(PHOTO, (20, 20, 1)))
    decode_times: list[tuple[float, float]] = []

    def work() -> None:
        for _ in range(3):
            begin = time.perf_counter()
            decode(data)
            decode_times.append((begin, time.perf_counter()))

    worker = threading.Thread(target=work)
    worker.start()
    ticks = []
    while worker.is_alive():
        time.sleep(0.0005)
        ticks.append(time.perf_counter())
    worker.join()
    # Were it not so, there would be a tick at the edges at most.
    within = max(sum(begin < tick < end for tick in ticks) for begin, end in decode_times)
    assert within >= 3


def test_an_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("expected this, got that", kind="corrupt")))
    assert isinstance(error, ImageError)
    assert str(error) == "expected this, got that"
    assert error.kind == "corrupt"


@pytest.fixture
def without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoding, "simplejpeg", None)
    decoding._say_that_simplejpeg_is_missing.cache_clear()
    yield
    decoding._say_that_simplejpeg_is_missing.cache_clear()


@pytest.mark.usefixtures("without_simplejpeg")
def test_without_simplejpeg_pillow_decodes_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="fastresnet.data"):
        for name, (data, expected) in ODD_FILES.items():
            header = verify(data)
            seen = upright(decode(data, header), header.orientation)
            np.testing.assert_array_equal(seen[..., :3], expected, err_msg=name)
    assert [record.message for record in caplog.records] == [
        "simplejpeg is not installed: Pillow decodes JPEGs, slower, and sees less damage "
        "(pip install simplejpeg)"
    ]
    for scale in (2, 4, 8):
        least = (HEIGHT // scale, WIDTH // scale)
        assert decode(JPEG, min_size=least).shape == (*least, 4)
    for end in (-2, len(JPEG) // 2):
        with pytest.raises(ImageError, match="truncated") as error:
            decode(JPEG[:end])
        assert error.value.kind == "truncated"


def test_plain_files_stay_as_they_are() -> None:
    for name in ("jpeg", "jpeg, grey", "jpeg, progressive", "jpeg, 4:4:4", "png", "png, rgba"):
        data, _ = ODD_FILES[name]
        assert as_plain(data, read_header(data)) == data


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_plain_file_shows_the_same(name: str) -> None:
    data, expected = ODD_FILES[name]
    plain = as_plain(data, read_header(data))
    header = verify(plain)
    assert header.mode in ("L", "RGB", "RGBA")
    assert as_plain(plain, header) == plain or header.format == "tiff"
    np.testing.assert_array_equal(pillow(plain), expected)


def test_a_plain_jpeg_has_one_exif_segment_and_its_end() -> None:
    data = with_exif(JPEG, exif(6), exif(3))[:-2]
    plain = as_plain(data, read_header(data))
    assert plain.count(b"Exif\0\0") == 1
    assert read_header(plain).orientation == 6
    assert plain.endswith(JPEG[scan_at(JPEG) :])
    upright_already = with_exif(JPEG, exif(1))
    assert as_plain(upright_already, read_header(upright_already)) == JPEG


@pytest.fixture(scope="module")
def dali() -> Callable[[bytes], np.ndarray]:
    """Decodes with DALI on the CPU."""
    fn = pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    from nvidia.dali import pipeline_def

    given_files: list[bytes] = []

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> object:
        encoded = fn.external_source(
            source=lambda _: np.frombuffer(given_files[-1], np.uint8), batch=False
        )
        return fn.decoders.image(encoded, device="cpu")

    def run(data: bytes) -> np.ndarray:
        given_files.append(data)
        built = pipeline()
        built.build()
        return np.array(built.run()[0].as_tensor())[0]

    return run


@pytest.mark.parametrize("name", ODD_FILES)
def test_dali_sees_the_same_in_a_plain_file(name: str, dali: Callable[[bytes], np.ndarray]) -> None:
    data, expected = ODD_FILES[name]
    np.testing.assert_array_equal(dali(as_plain(data, read_header(data))), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_dali_sees_the_same_orientation(
    orientation: int, order: str, dali: Callable[[bytes], np.ndarray]
) -> None:
    data = with_exif(JPEG, exif(orientation, order=order))
    seen = upright(decode(data), orientation)[..., :3]
    np.testing.assert_array_equal(dali(as_plain(data, read_header(data))), seen)


def test_dali_sees_the_same_in_a_jpeg_that_lacks_lines(
    dali: Callable[[bytes], np.ndarray],
) -> None:
    data = noisy_jpeg()
    data = data[: -round(0.02 * len(data))]
    seen = decode(data)[..., :3]
    np.testing.assert_array_equal(dali(as_plain(data, read_header(data))), seen)
