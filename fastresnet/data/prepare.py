# SPDX-License-Identifier: Apache-2.0
"""A copy of a data set at the size of training, made once so that every later epoch is cheap.

The copy has the layout of the original: the same names, the same files of labels. It is complete
or marked as not: a run that is killed at any moment goes on where it stopped, as images are
renamed into place when they are whole, and a journal says which were made, and of what.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from fastresnet.data.datasets.errors import DatasetError, Problem
from fastresnet.data.datasets.file_set import read_file
from fastresnet.data.datasets.index import Entry, Index
from fastresnet.data.datasets.registry import LAYOUTS, UNFINISHED, find_layout
from fastresnet.data.decode import Header, ImageError, decode, read_header, upright, verify
from fastresnet.data.fundus import Box, find_eye, subtract_local_average
from fastresnet.data.parallel import Progress, map_in_order, report
from fastresnet.files import write_atomically

_NOTES = ".prepare"  # a hidden folder, which no layout looks into
_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".ppm": "PPM",
    ".pgm": "PPM",
}
# JPEGs are decoded at a scale that leaves at least this many pixels for one: that differs less from
# shrinking the whole than the encoding will (43 to 54 dB beside 39 to 43, on photographs).
_OVERSAMPLING = 1.5
_JPEG_OPTIONS = {"quality": 95, "subsampling": "4:4:4"}


@dataclass(frozen=True)
class PrepareSettings:
    """What is done to an image.

    Args:
        size: the side of the square that training will see, in pixels.
        headroom: the shorter side becomes ``size`` times this. A quarter more than is seen leaves
            training something to rotate and crop from, and its own resampling less to blur;
            exactly ``size`` (1.0) makes smaller files, right for training without augmentation.
            No image is enlarged.
        crop_border: cut off the black frame of photographs of eyes:
            :func:`fastresnet.data.fundus.find_eye`.
        square: keep only the central square (of what the border leaves): all that training with
            ``crop="center"`` sees, and less to read.
        local_average: subtract the local average colour of photographs of eyes:
            :func:`fastresnet.data.fundus.subtract_local_average`.
    """

    size: int = 512
    headroom: float = 1.25
    crop_border: bool = False
    square: bool = False
    local_average: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected a size of at least 1, got {self.size}")
        if not 1 <= self.headroom <= 4:
            raise ValueError(f"expected a headroom in 1..4, got {self.headroom:g}")

    @property
    def short_side(self) -> int:
        """Pixels of the shorter side of a prepared image."""
        return round(self.size * self.headroom)


@dataclass(frozen=True)
class PrepareReport:
    """What a run made.

    Args:
        images: in the finished copy.
        made: in this run; the others were there before.
        skipped: images of the original that the copy lacks, and why.
        seconds: that the run took.
    """

    images: int
    made: int
    skipped: tuple[Problem, ...]
    seconds: float


def prepare_dataset(
    folder: Path,
    out: Path,
    settings: PrepareSettings | None = None,
    *,
    layout: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    threads: int | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes a copy of a data set of image files at the size of training.

    JPEGs are written at quality 95 without chroma subsampling, other formats without loss, each
    under its old name; metadata is dropped, and EXIF's orientation applied. An image that would
    come out as it is, is copied. Images without a label are left out.

    Args:
        folder: the data set.
        out: where the copy goes: a new folder, an empty one, or one that an earlier run with the
            same settings began.
        on_error: "raise" does everything else first and then raises, with ``out`` left unfinished,
            so that the files can be put right and the run repeated; "skip" leaves bad images out,
            and their lines out of the files of labels.
        threads: that decode and encode; None: one a processor.
        progress: is told how many of how many images are done.

    Raises:
        DatasetError: labels are wrong, or images are and ``on_error`` is "raise" (all are listed);
            or ``out`` holds something else, or a copy of other settings.
    """
    begin = time.perf_counter()
    settings = PrepareSettings() if settings is None else settings
    if on_error not in ("raise", "skip"):
        raise ValueError(f"expected on_error to be raise or skip, got {on_error!r}")
    found = find_layout(folder, layout)
    if found.index is None or found.read is not None:
        known = ", ".join(name for name, other in LAYOUTS.items() if other.index and not other.read)
        raise DatasetError(
            f"{folder}: expected a layout of image files ({known}), got {found.name}, whose images "
            "are small"
        )
    index = found.index(folder)
    errors = [
        problem
        for problem in index.problems
        if problem.error and (on_error == "raise" or problem.kind != "missing")
    ]
    if errors:
        raise DatasetError.listing(f"{folder} ({found.name} layout)", errors)
    entries = [entry for part in index.parts.values() for entry in part]
    _begin(folder, out, {"layout": found.name, **asdict(settings)})

    names = {entry.path: entry.path.relative_to(folder).as_posix() for entry in entries}

    def make(entry: Entry) -> _Made | Problem:
        return _make(entry.path, out / names[entry.path], out / _NOTES, settings)

    bad: dict[Path, Problem] = {}
    with _Journal(out / _NOTES / "made.jsonl") as journal:
        for name in journal.others(set(names.values())):
            (out / name).unlink(missing_ok=True)
        waiting = [
            entry
            for entry in entries
            if not journal.has(names[entry.path], entry.path, out / names[entry.path])
        ]
        results = map_in_order(make, waiting, threads=threads)
        done = len(entries) - len(waiting)
        results = report(results, len(entries), progress, done=done)
        for entry, result in zip(waiting, results, strict=True):
            if isinstance(result, Problem):
                bad[entry.path] = result
            else:
                journal.add(names[entry.path], result)
        if bad and on_error == "raise":
            raise DatasetError.listing(f"{folder} ({found.name} layout)", list(bad.values()))
        _write_labels(index, out, [entry for entry in entries if entry.path in bad])
        _finish(out)
    return PrepareReport(
        images=len(entries) - len(bad),
        made=len(waiting) - len(bad),
        skipped=tuple(bad.values()),
        seconds=time.perf_counter() - begin,
    )


def prepare_image(data: bytes, suffix: str, settings: PrepareSettings) -> bytes:
    """The file that takes the place of ``data`` under a name with this suffix.

    Raises:
        ImageError: the image cannot be used.
    """
    header = read_header(data)
    format = _FORMATS[suffix.lower()]
    short = min(header.width, header.height)
    plain = header.orientation == 1 and header.mode in ("L", "RGB")
    same = format == header.format.upper() and short <= settings.short_side
    whole = not settings.crop_border and not (settings.square and header.width != header.height)
    if plain and same and whole and not settings.local_average:
        verify(data)
        return data
    enough = math.ceil(_OVERSAMPLING * settings.short_side)
    image = _upright(data, header, (enough, enough))
    eye, box = _boxes(image, settings)
    if min(box.width, box.height) < enough:  # the eye fills little of the image
        image = _upright(data, header, None)
        eye, box = _boxes(image, settings)
    scale = min(settings.short_side / min(box.width, box.height), 1.0)
    size = (max(round(box.width * scale), 1), max(round(box.height * scale), 1))
    image = image.resize(
        size,
        Image.Resampling.LANCZOS,
        box=(box.left, box.top, box.right, box.bottom),
    ).convert("RGB")
    if settings.local_average:
        centre = (eye.left + eye.right) / 2 - box.left, (eye.top + eye.bottom) / 2 - box.top
        image = subtract_local_average(
            image,
            centre=(scale * centre[0], scale * centre[1]),
            radius=scale * max(eye.width, eye.height) / 2,
        )
    if header.mode == "L":
        image = image.convert("L")
    options: dict[str, Any] = _JPEG_OPTIONS if format == "JPEG" else {}
    file = io.BytesIO()
    image.save(file, format, **({"lossless": True} if format == "WEBP" else options))
    return file.getvalue()


def _upright(data: bytes, header: Header, min_size: tuple[int, int] | None) -> Image.Image:
    pixels = upright(decode(data, header, min_size=min_size), header.orientation)
    height, width = pixels.shape[:2]
    return Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)


def _boxes(image: Image.Image, settings: PrepareSettings) -> tuple[Box, Box]:
    """Where the eye is, if that matters, and what is kept of the image."""
    whole = Box(0, 0, image.width, image.height)
    eye = find_eye(image) if settings.crop_border or settings.local_average else whole
    kept = eye if settings.crop_border else whole
    return eye, _central_square(kept) if settings.square else kept


def _central_square(box: Box) -> Box:
    side = min(box.width, box.height)
    left, top = box.left + (box.width - side) // 2, box.top + (box.height - side) // 2
    return Box(left, top, left + side, top + side)


@dataclass(frozen=True)
class _Made:
    """An image of the copy: its size, and size and time of what it was made of."""

    size: int
    source_size: int
    source_time: int


def _make(path: Path, target: Path, notes: Path, settings: PrepareSettings) -> _Made | Problem:
    try:
        # Before reading: should the file change meanwhile, the next run makes it again.
        source = _stat(path)
        content = prepare_image(read_file(path), path.suffix, settings)
    except ImageError as error:
        target.unlink(missing_ok=True)  # made by an earlier run, when the file was better
        return Problem(error.kind, path, None, str(error))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not synced, which would take longer than the image: after a loss of power, the journal tells
    # by the size that a file is not what it was.
    temporary = notes / f"{threading.get_ident()}.tmp"
    temporary.write_bytes(content)
    temporary.replace(target)
    return _Made(len(content), source.st_size, source.st_mtime_ns)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        message = f"expected a readable file, got: {error.strerror}"
        raise ImageError(message, kind="missing") from error


class _Journal:
    """Which images of the copy are made, a line each, and one writer at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise DatasetError(
                f"{path.parent.parent}: expected no other run to write here, got one that does"
            ) from error
        self._file.seek(0)
        lines = self._file.read().split("\n")
        if lines[-1]:  # cut off when the run was killed
            self._file.write("\n")
        self._made: dict[str, _Made] = {}
        for line in lines[:-1]:
            try:
                name, *values = json.loads(line)
                self._made[name] = _Made(*values)
            except (ValueError, TypeError):
                continue  # that line: its image is made again

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def has(self, name: str, source: Path, target: Path) -> bool:
        """Whether ``target`` was made of ``source`` as it is now, and is still what was made."""
        made = self._made.get(name)
        try:
            status = source.stat()
            now = _Made(target.stat().st_size, status.st_size, status.st_mtime_ns)
        except OSError:
            return False
        return made == now

    def add(self, name: str, made: _Made) -> None:
        """Notes that an image is in its place."""
        self._file.write(json.dumps([name, *astuple(made)]) + "\n")
        self._file.flush()

    def others(self, names: set[str]) -> set[str]:
        """What was made and is not among ``names``."""
        return self._made.keys() - names


def _begin(folder: Path, out: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of the copy, or checks that it is one of these settings."""
    source, target = folder.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise DatasetError(f"expected a folder outside of {folder} for the copy, got {out}")
    wanted = {"source": str(source), **settings}
    notes = out / _NOTES / "settings.json"
    if notes.is_file():
        got = json.loads(notes.read_text())
        different = [
            f"{name} {got.get(name)!r} and now {value!r}"
            for name, value in wanted.items()
            if got.get(name) != value
        ]
        if different:
            raise DatasetError(
                f"{out}: expected the settings it was begun with, got {', '.join(different)}: "
                "choose another folder, or delete this one"
            )
    else:
        if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {_NOTES}):
            raise DatasetError(f"{out}: expected a new or empty folder for the copy, got another")
        notes.parent.mkdir(parents=True, exist_ok=True)
        # Before all else, or a killed run would leave a folder that no other run goes on with.
        text = json.dumps(wanted, indent=2) + "\n"
        write_atomically(notes, lambda temporary: temporary.write_text(text))
    (out / UNFINISHED).touch()


def _write_labels(index: Index, out: Path, left_out: Iterable[Entry]) -> None:
    """Copies the files of labels, without the lines of the entries that are left out."""
    lines = {row for entry in left_out for row in entry.rows}
    for path in index.label_files:
        kept = [
            line
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1)
            if (path, number) not in lines
        ]
        target = out / path.relative_to(index.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, partial(_write_lines, lines=kept))


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(lines)


def _finish(out: Path) -> None:
    for temporary in (out / _NOTES).glob("*.tmp"):
        temporary.unlink()
    (out / UNFINISHED).unlink()
