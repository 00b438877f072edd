# SPDX-License-Identifier: Apache-2.0
"""Damaged files, thousands of them: each gives pixels or an ImageError, soon, without a leak, and
``decode`` and ``verify`` agree about it.

They are decoded in a process of their own, so that a crash fails a test instead of ending them all.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import fastresnet
from fastresnet.data.decode import (
    ImageError,
    as_plain,
    decode,
    read_header,
    reduction,
    upright,
    verify,
)

COUNTS = {"JPEG": 2000, "others": 600}
SECONDS_A_FILE = 10
WARM_UP = 300
# Some 2 KiB for each decode: images that leak would take twice that. Large ones make the heap grow
# once.
GROWTH = 16 << 20


def originals(format: str) -> list[bytes]:
    """Small files of all common sorts."""
    y, x = np.mgrid[:72, :88]
    smooth = np.stack([x * 255 // 88, y * 255 // 72, (x + 2 * y) % 256], axis=-1)
    noise = np.random.default_rng(0).integers(-20, 21, smooth.shape)
    image = Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))
    grey = image.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []

    def save(image: Image.Image, format: str, **options: object) -> None:
        file = io.BytesIO()
        image.save(file, format, **options)
        files.append(file.getvalue())

    if format == "JPEG":
        for progressive in (False, True):
            save(image, "JPEG", progressive=progressive)
            save(image, "JPEG", progressive=progressive, subsampling="4:4:4", exif=exif)
            save(image, "JPEG", progressive=progressive, optimize=True, restart_marker_blocks=2)
            save(grey, "JPEG", progressive=progressive, quality=90)
        save(image.convert("CMYK"), "JPEG")
    else:
        save(image, "PNG", exif=exif)
        save(image.quantize(16), "PNG", transparency=3)
        save(image, "GIF")
        save(image, "BMP")
        save(image, "TIFF", compression="tiff_lzw")
        save(grey, "TIFF")
        save(image, "WEBP", exif=exif)
        save(image, "PPM")
    return files


def mutated(files: list[bytes], seed: int) -> bytes:
    """One of the files, with damage that depends on ``seed`` only."""
    choice = random.Random(seed)
    data = bytearray(choice.choice(files))
    kind = choice.choice(["bits", "bit", "cut", "header", "bytes", "lost", "marker", "doubled"])
    place = choice.randrange(2, len(data))
    if kind == "bit":
        data[place] ^= 1 << choice.randrange(8)
    elif kind == "bits":
        for _ in range(choice.randrange(2, 20)):
            data[choice.randrange(2, len(data))] ^= 1 << choice.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "header":
        for _ in range(choice.randrange(1, 4)):
            data[choice.randrange(2, min(700, len(data)))] = choice.randrange(256)
    elif kind == "bytes":
        length = choice.randrange(1, 40)
        data[place : place + length] = choice.randbytes(length)
    elif kind == "lost":
        del data[place : place + choice.randrange(1, 200)]
    elif kind == "marker":
        data[place:place] = bytes((0xFF, choice.randrange(1, 256)))
    else:
        end = choice.randrange(place, len(data))
        data[place:place] = data[place:end]
    return bytes(data)


def outcome(data: bytes, scale: int) -> str:
    """What ``decode`` makes of a file at a scale: "pixels", or the kind of fault."""
    try:
        header = read_header(data)
        least = (-(-header.height // scale), -(-header.width // scale))
        pixels = decode(data, header, min_size=least)
    except ImageError as error:
        return error.kind
    factor = reduction(header, least)
    assert pixels.shape == (-(-header.height // factor), -(-header.width // factor), 4)
    return "pixels"


def check(data: bytes) -> str:
    """Checks one file and returns its outcome."""
    got = outcome(data, 1)
    try:
        header = verify(data)
        verified = "pixels"
    except ImageError as error:
        verified = error.kind
    assert verified == got, f"verify says {verified}, decode {got}"
    assert outcome(data, 4) == got
    if got == "pixels":
        seen = upright(decode(data, header), header.orientation)
        with Image.open(io.BytesIO(as_plain(data, header))) as image:
            plain = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(plain, seen[..., :3])
    return got


def resident() -> int:
    """Bytes of memory that this process uses."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run() -> None:
    """Checks all; what it is at, and the result of each format, goes to stdout."""
    for format, count in COUNTS.items():
        files = originals(format)
        for data in files:
            assert check(data) == "pixels"
        outcomes: dict[str, int] = {}
        before = 0
        for seed in range(count):
            if seed == WARM_UP:
                before = resident()
            print(f"at {format} {seed}", flush=True)
            faulthandler.dump_traceback_later(SECONDS_A_FILE, exit=True)
            got = check(mutated(files, seed))
            outcomes[got] = outcomes.get(got, 0) + 1
        faulthandler.cancel_dump_traceback_later()
        result = {"format": format, "growth": resident() - before, "outcomes": outcomes}
        print("result " + json.dumps(result), flush=True)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_damaged_files_give_pixels_or_an_error() -> None:
    package = Path(fastresnet.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(package)},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}: {done.stderr[-3000:]}"
    results = [
        json.loads(line.removeprefix("result ")) for line in lines if line.startswith("result ")
    ]
    assert [result["format"] for result in results] == list(COUNTS)
    for result in results:
        assert sum(result["outcomes"].values()) == COUNTS[result["format"]]
        assert result["growth"] < GROWTH, result
        # Damage of every sort was seen, and some that does not matter.
        assert min(result["outcomes"].get(k, 0) for k in ("pixels", "corrupt", "truncated")) > 50


if __name__ == "__main__":
    run()
