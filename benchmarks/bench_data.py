# SPDX-License-Identifier: Apache-2.0
"""Loaders: JPEG files to augmented batches of 512 px, and a set of small images in memory.

The work on files is a retinopathy epoch's: the central square of each photograph at 512 px, flipped
at random and rotated by up to 30 degrees, normalised, in float32 batches. That in memory is
CIFAR-10's: 50,000 images of 32 x 32, cropped at random out of 4 pixels of padding, and flipped.
Every provider has two threads or two processes; the files are in the page cache.

Random numbers are each library's own. So what is compared beforehand are pictures that are always
flipped and never rotated, and each provider's must be within a grey level, on average, of
torchvision's transforms in float64 on the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import photographs
import pytest
import torch
import torch.nn.functional as F
from harness import Comparison, Provider
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from fastresnet.data import Augment, ImageSet, Loader, TensorLoader, make_loader
from fastresnet.data.dali import dali_missing
from fastresnet.data.datasets.file_set import FileSet
from fastresnet.data.prepare import PrepareSettings, prepare_image

Epoch = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # images and, as labels, their numbers

THREADS = 2
SIZE = 512
BATCH = 20
FILES = 20  # different ones
REPEATS = 4  # of each in an epoch, so that no worker runs dry
CACHE_REPEATS = 12  # what takes a twentieth of the time needs more of them
# An eighth more than is seen: files of just that size are beyond a grey level by their encoding.
CACHE = PrepareSettings(size=SIZE, headroom=1.125, square=True)
MEAN, STD = (0.3749, 0.2601, 0.1856), (0.2526, 0.1780, 0.1291)
GREY_LEVELS = 1.0

SMALL, SMALL_COUNT, SMALL_BATCH = 32, 50_000, 500
SMALL_MEAN, SMALL_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Case:
    """Photographs of one size."""

    name: str
    width: int
    height: int
    dtype: str = "float32"


CASES = (Case("files-3504x2336", 3504, 2336), Case("files-1024x1024", 1024, 1024))


@dataclass(frozen=True)
class Files:
    """What an epoch reads, and what is done to it. checked: always flipped, never rotated."""

    paths: tuple[Path, ...]
    checked: bool = False

    @property
    def flip(self) -> float:
        return 1.0 if self.checked else 0.5

    @property
    def angle(self) -> float:
        return 0.0 if self.checked else 30.0


class TransformedFiles(Dataset):
    """Torchvision's way: an image at a time, a transform after the other."""

    def __init__(self, files: Files, *, pil: bool) -> None:
        self.paths, self.pil = files.paths, pil
        self.transform = v2.Compose(
            [
                v2.Resize(SIZE, antialias=True),
                v2.CenterCrop(SIZE),
                v2.RandomHorizontalFlip(files.flip),
                v2.RandomVerticalFlip(files.flip),
                v2.RandomRotation(files.angle, interpolation=v2.InterpolationMode.BILINEAR),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        if self.pil:
            image = Image.open(path).convert("RGB")
        else:
            image = decode_jpeg(read_file(str(path)), ImageReadMode.RGB)
        return self.transform(image), index


def torchvision_epoch(files: Files, *, pil: bool) -> Epoch:
    return processes(TransformedFiles(files, pil=pil), BATCH)


def processes(dataset: Dataset, batch_size: int) -> Epoch:
    loader = DataLoader(dataset, batch_size, num_workers=THREADS, persistent_workers=True)
    return lambda: iter(loader)


def dali_epoch(files: Files) -> Epoch:
    """A pipeline as NVIDIA's documentation has it, but decoding only the central square."""
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(batch_size=BATCH, num_threads=THREADS, device_id=None, seed=1)
    def pipeline():
        encoded, numbers = fn.readers.file(
            files=[str(path) for path in files.paths],
            labels=list(range(len(files.paths))),
            pad_last_batch=True,
            name="files",
        )
        shape = fn.peek_image_shape(encoded)
        side = fn.cast(math.min(shape[0], shape[1]), dtype=types.FLOAT)
        images = fn.decoders.image_crop(encoded, crop_h=side, crop_w=side, output_type=types.RGB)
        bilinear = {"interp_type": types.INTERP_LINEAR}
        images = fn.resize(images, size=[SIZE, SIZE], antialias=True, **bilinear)
        images = fn.flip(
            images,
            horizontal=fn.random.coin_flip(probability=files.flip),
            vertical=fn.random.coin_flip(probability=files.flip),
        )
        if files.angle:
            angle = fn.random.uniform(range=(-files.angle, files.angle))
            images = fn.rotate(images, angle=angle, keep_size=True, fill_value=0, **bilinear)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
        )
        return images, numbers

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        # A new one each time: an old one would have begun with the epoch before it was asked to.
        batches = DALIGenericIterator(
            [pipeline()],
            ["images", "numbers"],
            reader_name="files",
            last_batch_policy=LastBatchPolicy.PARTIAL,
        )
        return ((batch[0]["images"], batch[0]["numbers"].flatten()) for batch in batches)

    return epoch


def our_epoch(files: Files, *, backend: str) -> Epoch:
    augment = Augment(
        size=SIZE, hflip=files.flip, vflip=files.flip, rotation=files.angle, mean=MEAN, std=STD
    )
    file_set = FileSet(files.paths, torch.arange(len(files.paths)))
    return made(
        make_loader(file_set, augment, BATCH, backend=backend, training=True, workers=THREADS)
    )


def made(loader: Loader) -> Epoch:
    return lambda: iter(loader)


def file_truth(files: Files) -> Tensor:
    """The pictures [N, 3, SIZE, SIZE], 0 to 1, in float64."""
    images = []
    for path in files.paths:
        image = decode_jpeg(read_file(str(path)), ImageReadMode.RGB).double()
        image = functional.center_crop(functional.resize(image, [SIZE], antialias=True), [SIZE])
        images.append(image.flip(1, 2) / 255)
    return torch.stack(images)


def compare_files(case: Case, folder: Path) -> Comparison:
    paths = photographs.write(folder / case.name, count=FILES, width=case.width, height=case.height)
    providers: list[tuple[str, str, Callable[[Files], Epoch]]] = [
        ("PIL + torchvision v2", "baseline", lambda files: torchvision_epoch(files, pil=True)),
        ("torchvision.io + v2", "peer", lambda files: torchvision_epoch(files, pil=False)),
    ]
    if not dali_missing():
        providers.append(("DALI on the CPU", "peer", dali_epoch))
        providers.append(
            ("fastresnet, dali", "context", lambda files: our_epoch(files, backend="dali"))
        )
    providers.append(("fastresnet", "ours", lambda files: our_epoch(files, backend="native")))
    timed, checked = Files(tuple(paths) * REPEATS), Files(tuple(paths[:4]), checked=True)
    comparison = Comparison(
        "data",
        case.name,
        metric="images_per_second",
        unit="images/s",
        work=len(timed.paths),
        config=asdict(case) | {"batch": BATCH, "size": SIZE},
    )
    for name, role, epoch in providers:
        step, once = drained(epoch(timed)), epoch(checked)
        comparison.add(name, step, lambda once=once: {"pixels": pixels(once, MEAN, STD)}, role=role)
    check_pixels(comparison, file_truth(checked))
    return comparison


def compare_cached(case: Case, folder: Path) -> Comparison:
    """What a cache at 512 px saves: torchvision on the photographs, all others on the cache."""
    comparison = Comparison(
        "data",
        f"cache-{SIZE}-of-{case.width}x{case.height}",
        metric="images_per_second",
        unit="images/s",
        work=FILES * CACHE_REPEATS,
        config=asdict(case) | {"batch": BATCH, "size": SIZE, "cache": CACHE.short_side},
        bar=20,
    )
    paths = photographs.write(folder / case.name, count=FILES, width=case.width, height=case.height)
    cached = [folder / f"cached-{path.name}" for path in paths]
    for path, target in zip(paths, cached, strict=True):
        target.write_bytes(prepare_image(path.read_bytes(), path.suffix, CACHE))
    originals, cache = Files(tuple(paths) * CACHE_REPEATS), Files(tuple(cached) * CACHE_REPEATS)
    checked, checked_cache = (Files(f.paths[:4], checked=True) for f in (originals, cache))
    for name, role, step, once in (
        (
            "PIL + torchvision v2",
            "baseline",
            torchvision_epoch(originals, pil=True),
            torchvision_epoch(checked, pil=True),
        ),
        (
            "the same, cached",
            "context",
            torchvision_epoch(cache, pil=True),
            torchvision_epoch(checked_cache, pil=True),
        ),
        (
            "fastresnet",
            "ours",
            our_epoch(cache, backend="native"),
            our_epoch(checked_cache, backend="native"),
        ),
    ):
        comparison.add(
            name, drained(step), lambda once=once: {"pixels": pixels(once, MEAN, STD)}, role=role
        )
    check_pixels(comparison, file_truth(checked))
    return comparison


class SmallTransformed(Dataset):
    """Torchvision's way with a set in memory."""

    def __init__(self, images: Tensor, *, padding: int, flip: float) -> None:
        self.images = images
        self.transform = v2.Compose(
            [
                v2.RandomCrop(SMALL, padding=padding),
                v2.RandomHorizontalFlip(flip),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(SMALL_MEAN, SMALL_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), index


def batched_epoch(images: Tensor, *, padding: int, flip: float) -> Epoch:
    """Plain torch on whole batches: gather the crops, flip some, scale; NHWC throughout."""
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    crops = padded.unfold(1, SMALL, 1).unfold(2, SMALL, 1).permute(0, 1, 2, 4, 5, 3)
    mean, std = torch.tensor(SMALL_MEAN), torch.tensor(SMALL_STD)
    scale, shift = 1 / (255 * std), -mean / std

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for numbers in torch.randperm(len(images)).split(SMALL_BATCH):
            top, left = torch.randint(2 * padding + 1, (2, len(numbers)))
            batch = crops[numbers, top, left]
            flipped = (torch.rand(len(numbers)) < flip).view(-1, 1, 1, 1)
            batch = torch.where(flipped, batch.flip(2), batch)
            yield torch.addcmul(shift, batch, scale).permute(0, 3, 1, 2), numbers

    return epoch


def our_small_epoch(images: Tensor, *, padding: int, flip: float) -> Epoch:
    augment = Augment(
        size=SMALL, crop="random", padding=padding, hflip=flip, mean=SMALL_MEAN, std=SMALL_STD
    )
    image_set = ImageSet(images.permute(0, 2, 3, 1).contiguous(), torch.arange(len(images)))
    return made(TensorLoader(image_set, augment, batch_size=SMALL_BATCH, training=True))


def compare_small(count: int) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, SMALL, SMALL)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    few = images[:SMALL_BATCH]

    def torchvision_way(images: Tensor, **settings) -> Epoch:
        return processes(SmallTransformed(images, **settings), SMALL_BATCH)

    comparison = Comparison(
        "data",
        f"memory-{SMALL}x{SMALL}-{count}",
        metric="images_per_second",
        unit="images/s",
        work=count,
        config={"batch": SMALL_BATCH, "size": SMALL, "dtype": "float32"},
        figures=lambda seconds: {"s an epoch": seconds},
    )
    for name, role, epoch in (
        ("torchvision v2", "baseline", torchvision_way),
        ("plain torch, batched", "peer", batched_epoch),
        ("fastresnet", "ours", our_small_epoch),
    ):
        step = drained(epoch(images, padding=4, flip=0.5))
        once = epoch(few, padding=0, flip=1.0)
        comparison.add(
            name,
            step,
            lambda once=once: {"pixels": pixels(once, SMALL_MEAN, SMALL_STD)},
            role=role,
        )
    check_pixels(comparison, few.flip(3).double() / 255)
    return comparison


def drained(epoch: Epoch) -> Callable[[], None]:
    """Goes through an epoch and uses each batch no more than to see that it is there."""

    def step() -> None:
        for images, numbers in epoch():
            assert len(images) == len(numbers)

    return step


def pixels(epoch: Epoch, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """An epoch's pictures in the order of their numbers, 0 to 1, in float64."""
    batches = list(epoch())
    images, numbers = (torch.cat(parts) for parts in zip(*batches, strict=True))
    undone = images.double() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return undone[numbers.argsort()]


def check_pixels(comparison: Comparison, truth: Tensor) -> None:
    """A provider whose pixels are further than a grey level from `truth` is not timed."""
    for provider in comparison.providers:
        provider.errors = {"grey levels": grey_levels(provider, truth)}
        if not provider.errors["grey levels"] < GREY_LEVELS:
            provider.status = f"failed: {provider.errors['grey levels']:.2f} grey levels off"


def grey_levels(provider: Provider, truth: Tensor) -> float:
    """The mean absolute difference."""
    return float((provider.results()["pixels"] - truth).abs().mean() * 255)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_files(
    case: Case, run: Callable[[Comparison], None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run(compare_files(case, tmp_path_factory.mktemp("photographs")))


def test_cache(run: Callable[[Comparison], None], tmp_path_factory: pytest.TempPathFactory) -> None:
    run(compare_cached(CASES[0], tmp_path_factory.mktemp("photographs")))


def test_memory(run: Callable[[Comparison], None]) -> None:
    run(compare_small(SMALL_COUNT))
