# SPDX-License-Identifier: Apache-2.0
"""Loaders of files: backends show the same images, once each, and go on where they stopped."""

from __future__ import annotations

import io
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from fastresnet.data import Augment, FileLoader, ImageError, TooManyFaultsError, make_loader
from fastresnet.data.dali import dali_missing
from fastresnet.data.datasets.file_set import FileSet

BACKENDS = ["torchvision", "native", "dali"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "dali" and dali_missing():
        pytest.skip(dali_missing())
    return request.param


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> FileSet:
    """Real photographs as JPEGs of several sizes: upright, lying, square, and reduced."""
    folder = tmp_path_factory.mktemp("photographs")
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    pictures += [picture.transpose(Image.Transpose.ROTATE_90) for picture in pictures]
    pictures += [picture.resize((1280, 854), Image.Resampling.BICUBIC) for picture in pictures[:2]]
    pictures += [picture.resize((200, 133), Image.Resampling.BOX) for picture in pictures[:2]]
    pictures += [picture.crop((100, 0, 527, 427)) for picture in pictures[:2]]
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number}.jpeg")
        picture.save(paths[-1], quality=90)
    return FileSet(tuple(paths), torch.arange(len(paths)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FileSet:
    """23 small noisy pictures, each with its index as its label."""
    folder = tmp_path_factory.mktemp("tiny")
    generator = np.random.default_rng(0)
    paths = []
    for number in range(23):
        paths.append(folder / f"{number}.jpg")
        height, width = generator.integers(12, 24, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1], quality=95)
    return FileSet(tuple(paths), torch.arange(len(paths)))


def loader(files: FileSet, augment: Augment, backend: str, **settings) -> FileLoader:
    settings = {"training": True, "workers": 2, "seed": 5, **settings}
    return make_loader(files, augment, settings.pop("batch_size", 4), backend=backend, **settings)


def by_label(made: FileLoader) -> dict[int, Tensor]:
    return {
        int(label): image
        for images, labels in made
        for image, label in zip(images, labels, strict=True)
    }


AUGMENTS = {
    "centre": Augment(size=128),
    "whole": Augment(size=(96, 160), crop="whole"),
    "flips": Augment(size=224, hflip=0.5, vflip=0.5, right_angles=(0.2, 0.2, 0.2)),
    "rotation": Augment(size=224, hflip=0.5, vflip=0.5, rotation=30),
    "zoom": Augment(size=(180, 240), rotation=180, zoom=(0.7, 1.4)),
    "random crop": Augment(size=128, resize=150, crop="random", padding=30, hflip=0.5),
    "random-resized": Augment(size=112, crop="random-resized", area=(0.1, 1), rotation=10),
    "colour": Augment(size=128, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
}


@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_backends_agree_on_photographs_within_a_grey_level(
    photographs: FileSet, name: str, backend: str
) -> None:
    expected, images = (
        by_label(loader(photographs, AUGMENTS[name], chosen)) for chosen in ("torchvision", backend)
    )
    assert images.keys() == expected.keys() == set(range(len(photographs)))
    for label, image in images.items():
        assert image.shape == expected[label].shape
        difference = (image - expected[label]).abs().mean() * 255
        assert difference < 1, f"photograph {label}: {difference:.2f} grey levels"


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("name", ["centre", "rotation", "zoom", "random crop", "random-resized"])
@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_backends_agree_on_places_within_a_pixel(
    tmp_path: Path, name: str, orientation: int, backend: str
) -> None:
    # Red and green are the place in the picture: differences of colour are distances.
    y, x = np.mgrid[:600, :900]
    pixels = np.stack([x * 255 / 899, y * 255 / 599, np.full(x.shape, 255)], axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "ramp.jpg"
    picture = Image.fromarray(np.rint(pixels).astype(np.uint8))
    picture.save(path, quality=100, subsampling=0, exif=exif)
    files = FileSet((path,) * 20, torch.arange(20))
    expected, images = (
        by_label(loader(files, AUGMENTS[name], chosen)) for chosen in ("torchvision", backend)
    )
    for label, image in images.items():
        # Where both are well inside the picture, which is where blue is full.
        inside = torch.minimum(image[2], expected[label][2]) > 0.995
        assert inside.float().mean() > 0.2
        moved = (image - expected[label]).abs()[:2, inside]
        along = expected[label].diff(dim=2).abs()[:2, :, :]
        pixel = float(along[:, inside[:, 1:] & inside[:, :-1]].mean(dim=1).max())
        assert moved.max() < 2 / 255 + pixel  # both are rounded to grey levels, the resize too


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "num_shards"), [(23, 1), (23, 2), (22, 3), (20, 1)])
def test_every_image_comes_once_an_epoch(
    tiny: FileSet, backend: str, count: int, num_shards: int, shuffle: bool
) -> None:
    files = tiny.subset(torch.arange(count))
    shards = [
        loader(
            files, Augment(size=8), backend, training=shuffle, shard=shard, num_shards=num_shards
        )
        for shard in range(num_shards)
    ]
    orders = []
    for _ in range(3):
        labels = [[labels for _, labels in shard] for shard in shards]
        assert [len(batches) for batches in labels] == [len(shard) for shard in shards]
        orders.append(torch.cat(list(itertools.chain(*labels))).tolist())
        assert sorted(orders[-1]) == list(range(count))
    assert (orders[0] != orders[1] != orders[2]) == shuffle


def test_epoch_goes_on_behind_the_saved_step(tiny: FileSet, backend: str) -> None:
    augment = Augment(size=10, crop="random-resized", hflip=0.5, rotation=15)
    whole = loader(tiny, augment, backend)
    whole.set_epoch(1)
    batches = list(whole)
    whole.set_epoch(1)
    going = iter(whole)
    for _ in range(2):
        next(going)
    state = whole.state_dict()
    going.close()
    again = loader(tiny, augment, backend, workers=1, prefetch=0)
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == len(batches) - 2
    for (images, labels), (wanted, wanted_labels) in zip(rest, batches[2:], strict=True):
        assert torch.equal(images, wanted)
        assert torch.equal(labels, wanted_labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_channels_last_in_the_asked_dtype(
    tiny: FileSet, backend: str, dtype: torch.dtype
) -> None:
    made = loader(tiny, Augment(size=(8, 12)), backend, dtype=dtype)
    for images, labels in made:
        assert images.dtype == dtype
        assert images.shape == (len(labels), 3, 8, 12)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
    assert made.description == f"{backend} (as asked for), 2 threads"


def test_normalisation_follows_the_value_range(tiny: FileSet, backend: str) -> None:
    settings = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7), "value_range": (-1, 1)}
    plain = by_label(loader(tiny, Augment(size=8), backend))
    normalised = by_label(loader(tiny, Augment(size=8, **settings), backend))
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    for label, image in normalised.items():
        torch.testing.assert_close(image, (plain[label] * 2 - 1 - mean) / std, atol=1e-5, rtol=0)


def test_smaller_images_show_the_same_crops(photographs: FileSet, backend: str) -> None:
    augment = Augment(size=128, crop="random-resized", hflip=0.5, rotation=20)
    full, small = loader(photographs, augment, backend), loader(photographs, augment, backend)
    small.set_epoch(0, image_size=64)
    full, small = by_label(full), by_label(small)
    for label, image in small.items():
        assert image.shape == (3, 64, 64)
        reduced = torch.nn.functional.avg_pool2d(full[label], 2)
        assert (image - reduced).abs().mean() < 8 / 255


def odd_files(folder: Path) -> FileSet:
    """One picture in the forms that decoders disagree about, all of the same colours."""
    y, x = np.mgrid[:48, :64]
    pixels = np.stack([x * 3 + 20, y * 4 + 20, 235 - x * 2 - y], axis=2).astype(np.uint8)
    picture, paths = Image.fromarray(pixels), []

    def save(name: str, image: Image.Image, **settings) -> None:
        paths.append(folder / name)
        image.save(paths[-1], **settings)

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(f"exif{orientation}.jpg", picture, quality=95, exif=exif)
    save("cmyk.jpg", picture.convert("CMYK"), quality=95)
    save("grey.jpg", picture.convert("L"), quality=95)
    save("progressive.jpg", picture, quality=95, progressive=True)
    save("palette.png", picture.quantize(64))
    save("alpha.png", Image.merge("RGBA", (*picture.split(), Image.new("L", (64, 48), 128))))
    save("wrong.jpeg", picture, format="PNG")
    save("bitmap.bmp", picture)
    save("tagged.tiff", picture)
    grey16 = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    save("grey16.png", Image.fromarray(grey16))
    return FileSet(tuple(paths), torch.arange(len(paths)))


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_backends_agree_on_odd_files(tmp_path: Path, backend: str) -> None:
    files = odd_files(tmp_path)
    augment = Augment(size=(48, 40), crop="whole")
    expected, images = (
        by_label(loader(files, augment, chosen)) for chosen in ("torchvision", backend)
    )
    for label, image in images.items():
        difference = float((image - expected[label]).abs().mean() * 255)
        assert difference < 1, f"{files.paths[label].name}: {difference:.2f} grey levels"


def damaged(tiny: FileSet, folder: Path) -> FileSet:
    """``tiny`` with one file truncated and one missing: those of the labels 3 and 11."""
    truncated = folder / "truncated.jpg"
    data = tiny.read(3)
    truncated.write_bytes(data[: len(data) // 2])
    paths = list(tiny.paths)
    paths[3], paths[11] = truncated, folder / "missing.jpg"
    return FileSet(tuple(paths), tiny.labels)


def test_weights_in_every_backend(tiny: FileSet, backend: str) -> None:
    weights = torch.ones(len(tiny))
    weights[:2] = 10
    augment = Augment(size=16, crop="random-resized", hflip=0.5)
    ours, reference = (
        [*loader(tiny, augment, chosen, weights=weights)] for chosen in (backend, "torchvision")
    )
    labels = torch.cat([labels for _, labels in ours])
    assert torch.equal(labels, torch.cat([labels for _, labels in reference]))
    images, expected = (torch.cat([images for images, _ in made]) for made in (ours, reference))
    assert (images - expected).abs().mean() < 1 / 255
    assert (torch.bincount(labels)[:2] - len(tiny) * 10 / weights.sum()).abs().max() < 1
    views = images[labels == 0]
    distances = torch.cdist(views.flatten(1), views.flatten(1))
    assert distances[~torch.eye(len(views), dtype=bool)].min() > 0  # each another crop


@pytest.mark.parametrize("on_error", ["skip", "placeholder"])
def test_bad_files_that_come_often(
    tmp_path: Path, tiny: FileSet, backend: str, on_error: str
) -> None:
    files = damaged(tiny, tmp_path)
    weights = torch.ones(len(files))
    weights[3] = 20  # the truncated one
    settings = {"on_error": on_error, "error_limit": 0.2, "weights": weights}
    made = loader(files, Augment(size=8), backend, **settings)
    images, labels = (torch.cat(tensors) for tensors in zip(*made, strict=True))
    assert len(labels) == len(files)
    assert 3 in made.faults.files
    black = images.flatten(1).abs().amax(1) == 0
    if on_error == "skip":
        assert not black.any()
        assert 3 not in labels
    else:
        assert torch.equal(
            black, torch.tensor([int(label) in made.faults.files for label in labels])
        )


def test_a_bad_file_is_raised_with_its_name(tmp_path: Path, tiny: FileSet, backend: str) -> None:
    files = damaged(tiny, tmp_path)
    with pytest.raises(ImageError, match=r"truncated\.jpg: .*") as caught:
        list(loader(files, Augment(size=8), backend, training=False))
    assert caught.value.kind == "truncated"
    with pytest.raises(ImageError, match=r"missing\.jpg: .*") as caught:
        list(loader(files.subset(torch.arange(8, 16)), Augment(size=8), backend, training=False))
    assert caught.value.kind == "missing"


def test_skipped_files_are_replaced_in_training(
    tmp_path: Path, tiny: FileSet, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"on_error": "skip", "error_limit": 0.1}
    made = loader(damaged(tiny, tmp_path), Augment(size=8), backend, **settings)
    with caplog.at_level(logging.WARNING, "fastresnet.data"):
        for _ in range(2):
            labels = torch.cat([labels for _, labels in made]).tolist()
            assert len(labels) == 23
            assert set(labels) == set(range(23)) - {3, 11}
    assert made.faults.files.keys() == {3, 11}
    assert [record.message[-6:] for record in caplog.records] == ["(skip)"] * 2
    # The file in the place of a bad one is the next of the epoch's order that can be read.
    made.set_epoch(0)
    intact = loader(tiny, Augment(size=8), backend)
    order = torch.cat([labels for _, labels in intact]).tolist()
    shown = torch.cat([labels for _, labels in made]).tolist()
    for place, label in enumerate(order):
        if label in (3, 11):
            following = [next_ for next_ in order[place:] + order if next_ not in (3, 11)]
            assert shown[place] == following[0]
        else:
            assert shown[place] == label


def test_skipped_files_are_left_out_of_evaluation(
    tmp_path: Path, tiny: FileSet, backend: str
) -> None:
    settings = {"on_error": "skip", "error_limit": 0.1, "training": False}
    made = loader(damaged(tiny, tmp_path), Augment(size=8), backend, **settings)
    batches = list(made)
    assert torch.cat([labels for _, labels in batches]).tolist() == sorted(set(range(23)) - {3, 11})
    assert all(len(images) == len(labels) for images, labels in batches)
    assert len(made.faults) == 2


def test_placeholders_are_black_with_the_label(tmp_path: Path, tiny: FileSet, backend: str) -> None:
    augment = Augment(size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    settings = {"on_error": "placeholder", "error_limit": 0.1}
    made = loader(damaged(tiny, tmp_path), augment, backend, **settings)
    images = by_label(made)
    assert images.keys() == set(range(23))
    for label, image in images.items():
        black = (image == torch.tensor([-0.2, -0.4, -0.6])[:, None, None]).all()
        assert black == (label in (3, 11))


def test_too_many_bad_files_stop_the_run(tmp_path: Path, tiny: FileSet, backend: str) -> None:
    files = damaged(tiny, tmp_path)
    made = loader(files, Augment(size=8), backend, on_error="skip", error_limit=0.01)
    with pytest.raises(TooManyFaultsError, match="expected at most 1 of 23 files that cannot be"):
        list(made)


def test_bad_settings_are_named(tiny: FileSet) -> None:
    with pytest.raises(
        ValueError, match="on_error to be one of raise, skip, placeholder, got 'no'"
    ):
        loader(tiny, Augment(size=8), "native", on_error="no")
    with pytest.raises(ValueError, match=r"a limit as a share in 0\.\.1, got 2"):
        loader(tiny, Augment(size=8), "native", error_limit=2)
    with pytest.raises(ValueError, match="at least one worker and a prefetch of at least 0"):
        loader(tiny, Augment(size=8), "native", prefetch=-1)


def test_backend_auto_is_native_on_a_cpu(tiny: FileSet) -> None:
    made = loader(tiny, Augment(size=8), "auto")
    assert made.description == "native (the fastest for a CPU), 2 threads"


def test_missing_dali_names_the_package(tiny: FileSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'dali': expected the package nvidia-dali-cuda130: pip"):
        loader(tiny, Augment(size=8), "dali")


def test_an_abandoned_epoch_leaves_no_thread_behind(tiny: FileSet, backend: str) -> None:
    import threading

    before = threading.active_count()
    for _ in range(3):
        going = iter(loader(tiny, Augment(size=8), backend))
        next(going)
        going.close()
    assert threading.active_count() <= before


def test_a_png_in_memory_is_read_by_content(tmp_path: Path, backend: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (255, 0, 0)).save(buffer, "PNG")
    path = tmp_path / "no-suffix"
    path.write_bytes(buffer.getvalue())
    images, _ = next(iter(loader(FileSet((path,), torch.zeros(1).long()), Augment(9), backend)))
    assert images[0].mean(dim=(1, 2)).tolist() == [1, 0, 0]
