# SPDX-License-Identifier: Apache-2.0
"""Preparing a data set: what becomes of an image, of the labels, of bad files and killed runs."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, ImageFilter
from scipy import ndimage

from fastresnet.data import (
    DatasetError,
    ImageDataset,
    ImageSet,
    open_dataset,
    prepare,
    write_cifar10,
    write_retinopathy,
)
from fastresnet.data.check import check_dataset
from fastresnet.data.datasets.registry import UNFINISHED
from fastresnet.data.decode import ImageError, decode, read_header
from fastresnet.data.fundus import Box, find_eye, subtract_local_average
from fastresnet.data.prepare import PrepareSettings, prepare_dataset, prepare_image

RETINA = Path(skimage.__file__).parent / "data" / "retina.jpg"
SMALL = PrepareSettings(size=32)


def draw_eye(
    width: int, height: int, radius: int, *, centre: tuple[int, int], noise: float, black: float = 4
) -> Image.Image:
    """A disc, darker towards its edge, in a frame that is as noisy."""
    y, x = np.ogrid[:height, :width]
    distance = np.hypot(x - centre[0], y - centre[1])[..., None] / radius
    disc = np.array([160, 80, 40]) * (1 - 0.5 * distance**2)
    pixels = np.where(distance < 1, disc, black)
    pixels = pixels + np.random.default_rng(0).normal(0, noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "radius", "centre", "noise"),
    [
        (1200, 800, 350, (560, 410), 0),
        (1200, 800, 350, (560, 410), 25),
        (900, 600, 420, (450, 300), 0),  # cut off above and below
        (900, 600, 420, (450, 300), 25),
        (500, 700, 200, (260, 300), 25),
        (160, 120, 40, (80, 60), 0),
        (160, 120, 40, (80, 60), 8),
    ],
)
def test_the_eye_is_found_in_its_frame(
    width: int, height: int, radius: int, centre: tuple[int, int], noise: float
) -> None:
    image = draw_eye(width, height, radius, centre=centre, noise=noise)
    box = find_eye(image)
    x, y = centre
    wanted = (
        max(x - radius, 0),
        max(y - radius, 0),
        min(x + radius, width),
        min(y + radius, height),
    )
    # Within a pixel or two of the reduced image, and not above two hundredths of the eye.
    close = 2 * max(max(width, height) // 256, 1) + 0.01 * radius
    got = (box.left, box.top, box.right, box.bottom)
    assert np.abs(np.subtract(got, wanted)).max() <= close


def test_a_frame_need_not_be_black_nor_clean() -> None:
    image = draw_eye(900, 600, 250, centre=(450, 300), noise=4, black=25)
    pixels = np.array(image)
    random = np.random.default_rng(1)
    specks = random.integers(0, (600, 900), (40, 2))
    for y, x in specks:
        pixels[y : y + 3, x : x + 3] = 255
    box = find_eye(Image.fromarray(pixels))
    got = (box.left, box.top, box.right, box.bottom)
    assert np.abs(np.subtract(got, (200, 50, 700, 550))).max() <= 9


def test_images_without_a_frame_are_left_whole() -> None:
    random = np.random.default_rng(0)
    bright = Image.fromarray(random.integers(100, 256, (300, 400, 3), dtype=np.uint8))
    dark = Image.fromarray(random.integers(0, 12, (300, 400, 3), dtype=np.uint8))
    for image in (bright, dark, Image.new("RGB", (400, 300))):
        assert find_eye(image) == Box(0, 0, 400, 300)
    assert find_eye(Image.new("RGB", (1, 1), "white")) == Box(0, 0, 1, 1)


def test_the_eye_of_a_real_photograph_is_found() -> None:
    photograph = Image.open(RETINA).convert("RGB")
    framed = Image.new("RGB", (2400, 1700))
    framed.paste(photograph, (500, 120))
    alone, moved = find_eye(photograph), find_eye(framed)
    assert alone.width > 0.95 * photograph.width
    assert abs(moved.left - alone.left - 500) <= 18
    assert abs(moved.top - alone.top - 120) <= 18
    assert abs(moved.width - alone.width) <= 18


def test_local_average_is_grahams_formula() -> None:
    image = Image.open(RETINA).convert("RGB").resize((320, 320), Image.Resampling.BOX)
    radius = 160.0
    got = np.asarray(subtract_local_average(image, centre=(160, 160), radius=radius), dtype=float)
    pixels = np.asarray(image, dtype=float)
    average = ndimage.gaussian_filter(pixels, (radius / 30, radius / 30, 0), mode="nearest")
    wanted = np.clip(4 * (pixels - average) + 128, 0, 255)
    y, x = np.ogrid[:320, :320]
    inside = np.hypot(x + 0.5 - 160, y + 0.5 - 160) <= 0.9 * radius
    assert (got[~inside] == 128).all()
    # The average is rounded to whole levels and then multiplied by four.
    error = np.abs(got - wanted)[inside]
    assert error.mean() < 3
    assert np.percentile(error, 99) <= 8


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_the_shorter_side_gets_the_headroom() -> None:
    photograph = Image.open(RETINA).convert("RGB").crop((200, 200, 1100, 800))  # 900 x 600
    data = encoded(photograph, quality=95)
    for settings, size in (
        (PrepareSettings(size=128), (240, 160)),
        (PrepareSettings(size=128, headroom=1.0), (192, 128)),
        (PrepareSettings(size=200, headroom=1.5), (450, 300)),
    ):
        image = Image.open(io.BytesIO(prepare_image(data, ".jpeg", settings)))
        assert image.size == size
        assert (image.format, image.mode) == ("JPEG", "RGB")
        # As Pillow shrinks the whole, but for the gap that it is allowed and the encoding.
        wanted = Image.open(io.BytesIO(data)).resize(size, Image.Resampling.LANCZOS)
        assert np.abs(np.subtract(image, wanted, dtype=float)).mean() < 1.5
        # 4:4:4: no component has fewer samples than another.
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3


def test_an_image_that_would_stay_the_same_is_copied() -> None:
    image = Image.open(RETINA).convert("RGB").resize((60, 40))
    for format, suffix in (("JPEG", ".JPG"), ("PNG", ".png")):
        data = encoded(image, format)
        assert prepare_image(data, suffix, SMALL) == data
    half = encoded(image)[:1000]
    with pytest.raises(ImageError):  # but not unseen
        prepare_image(half, ".jpeg", SMALL)


def test_odd_images_become_plain_ones() -> None:
    image = Image.open(RETINA).convert("RGB").resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, exif=exif, quality=95)
    turned = Image.open(io.BytesIO(prepare_image(data, ".jpeg", SMALL)))
    assert turned.size == (40, 60)
    assert dict(turned.getexif()) == {}
    wanted = Image.fromarray(decode(data)[..., :3]).rotate(-90, expand=True)
    wanted = wanted.resize((40, 60), Image.Resampling.LANCZOS)
    wanted = Image.open(io.BytesIO(encoded(wanted, quality=95, subsampling="4:4:4")))
    assert np.array_equal(np.asarray(turned), np.asarray(wanted))
    for odd, suffix, format, mode in (
        (encoded(image.convert("CMYK")), ".jpeg", "JPEG", "RGB"),
        (encoded(image.convert("L")), ".jpeg", "JPEG", "L"),
        (encoded(image.convert("P"), "PNG"), ".png", "PNG", "RGB"),
        (encoded(image, "PNG"), ".jpeg", "JPEG", "RGB"),
        (encoded(image, "TIFF"), ".tif", "TIFF", "RGB"),
        (encoded(image, "WEBP"), ".webp", "WEBP", "RGB"),
    ):
        prepared = prepare_image(odd, suffix, SMALL)
        got = Image.open(io.BytesIO(prepared))
        assert (got.format, got.mode, got.size) == (format, mode, (60, 40))
        assert read_header(prepared).orientation == 1
        if format != "JPEG":  # without loss
            wanted = Image.fromarray(decode(odd)[..., :3]).resize(
                got.size, Image.Resampling.LANCZOS
            )
            assert np.array_equal(np.asarray(got), np.asarray(wanted))


def test_cropping_and_normalising_together() -> None:
    data = encoded(draw_eye(900, 600, 250, centre=(430, 310), noise=2), quality=98)
    cropped = prepare_image(data, ".jpeg", PrepareSettings(size=64, crop_border=True))
    image = Image.open(io.BytesIO(cropped))
    assert abs(image.width / image.height - 1) < 0.03
    assert min(image.size) == 80
    both = PrepareSettings(size=64, crop_border=True, local_average=True)
    pixels = np.asarray(Image.open(io.BytesIO(prepare_image(data, ".jpeg", both))), dtype=float)
    assert np.abs(pixels[:6, :6] - 128).max() <= 3
    only = prepare_image(data, ".jpeg", PrepareSettings(size=64, local_average=True))
    pixels = np.asarray(Image.open(io.BytesIO(only)), dtype=float)
    assert pixels.shape == (80, 120, 3)
    # Beyond nine tenths of the eye's own radius, wherever the eye is.
    y, x = np.ogrid[:80, :120]
    scale = 80 / 600
    distance = np.hypot(x + 0.5 - 430 * scale, y + 0.5 - 310 * scale) / (250 * scale)
    assert np.abs(pixels[distance > 1.0] - 128).max() <= 8


def test_the_central_square_is_that_of_a_central_crop() -> None:
    data = encoded(Image.open(RETINA).convert("RGB").resize((301, 200)), "PNG")
    square = PrepareSettings(size=64, square=True)
    got = Image.open(io.BytesIO(prepare_image(data, ".png", square)))
    wanted = Image.fromarray(decode(data)[..., :3])
    wanted = wanted.resize((80, 80), Image.Resampling.LANCZOS, box=(50, 0, 250, 200))
    assert np.array_equal(np.asarray(got), np.asarray(wanted))
    small = encoded(Image.new("RGB", (60, 40)), "PNG")  # small enough, but not square
    assert Image.open(io.BytesIO(prepare_image(small, ".png", square))).size == (40, 40)
    of_the_eye = encoded(draw_eye(900, 600, 250, centre=(430, 310), noise=2), quality=98)
    both = PrepareSettings(size=64, square=True, crop_border=True)
    assert Image.open(io.BytesIO(prepare_image(of_the_eye, ".jpeg", both))).size == (80, 80)


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    retina = np.asarray(Image.open(RETINA).convert("RGB"))
    return [retina[y : y + 90, 300 : 300 + 120] for y in range(200, 1100, 45)]


@pytest.fixture
def folder(tmp_path: Path, photographs: list[np.ndarray]) -> Path:
    grades = [number % 5 for number in range(20)]
    groups = [number // 2 for number in range(20)]
    write_retinopathy(photographs, grades, groups, tmp_path / "data")
    return tmp_path / "data"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a data set, without the hidden ones."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }


def test_the_copy_is_a_data_set_like_the_original(folder: Path, tmp_path: Path) -> None:
    calls = []
    out = tmp_path / "out"
    report = prepare_dataset(folder, out, SMALL, progress=lambda *call: calls.append(call))
    assert (report.images, report.made, report.skipped) == (20, 20, ())
    assert calls == [(done, 20) for done in range(1, 21)]
    assert contents(out).keys() == contents(folder).keys()
    assert contents(out)["trainLabels.csv"] == contents(folder)["trainLabels.csv"]
    assert check_dataset(out, full=True).problems == ()
    ours, theirs = open_dataset(out), open_dataset(folder)
    for got, wanted in zip(ours.parts.values(), theirs.parts.values(), strict=True):
        assert got.labels.equal(wanted.labels)
        assert got.groups.equal(wanted.groups)
        assert [path.name for path in got.paths] == [path.name for path in wanted.paths]
    assert Image.open(ours.train.paths[0]).size == (53, 40)

    # Once more: nothing is left to do.
    calls.clear()
    assert prepare_dataset(folder, out, SMALL).made == 0


@pytest.mark.parametrize("layout", ["image-folder", "image-csv", "columns"])
def test_other_layouts(tmp_path: Path, photographs: list[np.ndarray], layout: str) -> None:
    folder, out = tmp_path / "data", tmp_path / "out"
    if layout == "columns":
        write_retinopathy(photographs, [0, 1, 2, 3] * 5, None, folder, test=[3, 4])
    else:
        rows = ["class id,filepaths,labels,data set"]
        for number, photograph in enumerate(photographs):
            part, label = ("train", "test")[number % 5 == 0], number % 2
            path = folder / part / "ab"[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph).save(path)
            rows.append(f"{label},{path.relative_to(folder)},{'ab'[label]},{part}")
        if layout == "image-csv":
            (folder / "photographs.csv").write_text("\n".join(rows))
    prepare_dataset(folder, out, SMALL)
    assert contents(out).keys() == contents(folder).keys()
    ours, theirs = open_dataset(out), open_dataset(folder)
    assert ours.classes == theirs.classes
    for got, wanted in zip(ours.parts.values(), theirs.parts.values(), strict=True):
        assert got.labels.equal(wanted.labels)
        for path in got.paths:
            assert min(Image.open(path).size) == 40


def test_only_what_changed_is_made_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_dataset(folder, out, SMALL)
    first = contents(out)
    images = folder / "images"
    Image.new("RGB", (90, 90), "white").save(images / "0_left.jpeg")  # the original changed
    (out / "images" / "1_left.jpeg").unlink()  # lost
    (out / "images" / "2_left.jpeg").write_bytes(b"")  # as after a loss of power
    assert prepare_dataset(folder, out, SMALL).made == 3
    second = contents(out)
    assert {name for name in first if first[name] != second[name]} == {"images/0_left.jpeg"}

    # An image that the original no longer lists leaves the copy too.
    lines = (folder / "trainLabels.csv").read_text().splitlines()
    (folder / "trainLabels.csv").write_text("\n".join(lines[:-1]) + "\n")
    (images / "9_right.jpeg").unlink()
    report = prepare_dataset(folder, out, SMALL)
    assert (report.images, report.made) == (19, 0)
    assert contents(out).keys() == contents(folder).keys()
    assert check_dataset(out).problems == ()


def damage(folder: Path) -> None:
    images = folder / "images"
    content = (images / "3_left.jpeg").read_bytes()
    (images / "3_left.jpeg").write_bytes(content[: len(content) // 2])
    (images / "4_right.jpeg").write_bytes(b"<html>")
    (images / "5_left.jpeg").unlink()


def test_bad_files_fail_at_the_end_and_can_be_put_right(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sound = (folder / "images" / "3_left.jpeg").read_bytes()
    damage(folder)
    with pytest.raises(DatasetError, match="5_left") as error:
        prepare_dataset(folder, out, SMALL)  # a missing file is known before the work
    assert [problem.kind for problem in error.value.problems] == ["missing"]
    assert not out.exists()

    (folder / "images" / "5_left.jpeg").write_bytes(sound)
    with pytest.raises(DatasetError) as error:
        prepare_dataset(folder, out, SMALL)
    names = [problem.path.name for problem in error.value.problems]
    assert names == ["3_left.jpeg", "4_right.jpeg"]
    with pytest.raises(DatasetError, match="interrupted"):
        open_dataset(out)

    for name in names:
        (folder / "images" / name).write_bytes(sound)
    report = prepare_dataset(folder, out, SMALL)
    assert (report.images, report.made) == (20, 2)
    assert check_dataset(out).problems == ()


@pytest.mark.parametrize("test", [None, [6, 7, 8]])
def test_bad_files_can_be_left_out_with_their_labels(
    tmp_path: Path, photographs: list[np.ndarray], test: list[int] | None
) -> None:
    folder, out = tmp_path / "data", tmp_path / "out"
    groups = [number // 2 for number in range(20)]
    write_retinopathy(photographs, [0, 1, 2, 3, 4] * 4, groups, folder, test=test)
    damage(folder)
    before = contents(folder)
    report = prepare_dataset(folder, out, SMALL, on_error="skip")
    assert (report.images, report.made) == (17, 17)
    skipped = {problem.path.name: problem.kind for problem in report.skipped}
    assert skipped == {
        "3_left.jpeg": "truncated",
        "4_right.jpeg": "not an image",
        "5_left.jpeg": "missing",
    }
    assert contents(folder) == before
    assert check_dataset(out, full=True).errors == ()
    ours = open_dataset(out, test_share=0)
    theirs = open_dataset(folder, test_share=0, allow_missing=True)
    for got, wanted in zip(ours.parts.values(), theirs.parts.values(), strict=True):
        labels = dict(
            zip((path.name for path in wanted.paths), wanted.labels.tolist(), strict=True)
        )
        for name in skipped:
            labels.pop(name, None)
        assert labels == dict(
            zip((path.name for path in got.paths), got.labels.tolist(), strict=True)
        )


def test_an_image_that_went_bad_leaves_the_copy(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_dataset(folder, out, SMALL)
    (folder / "images" / "3_left.jpeg").write_bytes(b"")
    assert prepare_dataset(folder, out, SMALL, on_error="skip").images == 19
    assert not (out / "images" / "3_left.jpeg").exists()
    assert check_dataset(out).problems == ()


def test_other_settings_and_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_dataset(folder, out, SMALL)
    made = contents(out)
    for settings, message in (
        (PrepareSettings(size=48), "size 32 and now 48"),
        (PrepareSettings(size=32, headroom=1.0), "headroom 1.25 and now 1.0"),
        (PrepareSettings(size=32, crop_border=True), "crop_border False and now True"),
    ):
        with pytest.raises(DatasetError, match=message):
            prepare_dataset(folder, out, settings)
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(DatasetError, match="expected the settings it was begun with, got source"):
        prepare_dataset(tmp_path / "other", out, SMALL)
    assert contents(out) == made
    assert not (out / UNFINISHED).exists()

    for target in (folder, folder / "small", tmp_path):
        with pytest.raises(DatasetError, match="expected a folder outside of"):
            prepare_dataset(folder, target, SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for target in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(DatasetError, match="expected a new or empty folder for the copy"):
            prepare_dataset(folder, target, SMALL)
    with pytest.raises(ValueError, match="expected a size of at least 1, got 0"):
        PrepareSettings(size=0)
    with pytest.raises(ValueError, match=r"expected a headroom in 1\.\.4, got 0\.5"):
        PrepareSettings(headroom=0.5)
    with pytest.raises(ValueError, match="expected on_error to be raise or skip, got 'ignore'"):
        prepare_dataset(folder, out, SMALL, on_error="ignore")


def test_wrong_labels_stop_it_before_the_work(folder: Path, tmp_path: Path) -> None:
    with (folder / "trainLabels.csv").open("a") as file:
        file.write("0_left,9\n")
    for on_error in ("raise", "skip"):
        with pytest.raises(DatasetError, match="expected each image once"):
            prepare_dataset(folder, tmp_path / "out", SMALL, on_error=on_error)
    assert not (tmp_path / "out").exists()


def test_sets_in_memory_need_no_preparing(tmp_path: Path) -> None:
    part = ImageSet(torch.zeros(5, 32, 32, 3, dtype=torch.uint8), torch.arange(5))
    write_cifar10(ImageDataset("n", part, part, tuple("abcde"), "here"), tmp_path / "data")
    with pytest.raises(DatasetError, match=r"expected a layout of image files .* got cifar10"):
        prepare_dataset(tmp_path / "data", tmp_path / "out")


# A hundredth of a second an image: time to be killed in.
RUN = """
import sys, time
from pathlib import Path
from fastresnet.data import prepare

whole = prepare.prepare_image

def slow(*arguments):
    time.sleep(0.01)
    return whole(*arguments)

prepare.prepare_image = slow
settings = prepare.PrepareSettings(size=32)
prepare.prepare_dataset(Path(sys.argv[1]), Path(sys.argv[2]), settings, threads=2)
"""


def wait_for(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Waits until a journal has so many lines."""
    end = time.monotonic() + 60
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_dataset(folder, whole, SMALL)
    arguments = [sys.executable, "-c", RUN, str(folder), str(out)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    wait_for(out / ".prepare" / "made.jsonl", 6, process)
    process.kill()
    process.communicate()
    with pytest.raises(DatasetError, match="got one whose writing was interrupted"):
        open_dataset(out)
    # What is in place is whole, whenever the kill came.
    for name, content in contents(out).items():
        assert content == contents(whole)[name]
    # The journal's last line may be cut off, and a temporary file be left.
    with (out / ".prepare" / "made.jsonl").open("ab") as file:
        file.write(b'["images/9_ri')
    (out / ".prepare" / "1234.tmp").write_bytes(b"half")
    report = prepare_dataset(folder, out, SMALL)
    assert (report.images, report.made) == (20, report.made)
    assert 0 < report.made <= 14
    assert contents(out) == contents(whole)
    assert not list((out / ".prepare").glob("*.tmp"))
    assert prepare_dataset(folder, out, SMALL).made == 0


def test_two_runs_do_not_write_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def wait(*arguments: object) -> bytes:
        entered.set()
        assert leave.wait(60)
        return prepare_image(*arguments)

    monkeypatch.setattr(prepare, "prepare_image", wait)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(prepare_dataset, folder, tmp_path / "out", SMALL)
        try:
            assert entered.wait(60)
            with pytest.raises(DatasetError, match="expected no other run to write here, got one"):
                prepare_dataset(folder, tmp_path / "out", SMALL)
        finally:
            leave.set()
        assert first.result().made == 20


def test_blurs_agree() -> None:
    # Pillow's blur is three boxes; the bound is what the docstring of the caller relies on.
    image = Image.open(RETINA).convert("RGB").resize((640, 640), Image.Resampling.BOX)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(640 / 60)), dtype=float)
    exact = ndimage.gaussian_filter(
        np.asarray(image, dtype=float), (640 / 60, 640 / 60, 0), mode="nearest"
    )
    assert np.abs(blurred - exact).mean() < 1
