# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour 32x32 photographs.

Both published forms are read, unpacked or as the archive: the pickled batches of
``cifar-10-python.tar.gz`` and the plain bytes of ``cifar-10-binary.tar.gz``. :func:`write_cifar10`
packs any set of small images into the same files.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from fastresnet.data.datasets.cifar_pickle import dump_batch, load_batch
from fastresnet.data.datasets.download import cache_folder, torchvision_download
from fastresnet.data.datasets.errors import DatasetError, DatasetNotFoundError, read_all
from fastresnet.data.datasets.image_set import ImageDataset, ImageSet

_SIZE = 32
_PIXELS = 3 * _SIZE * _SIZE
# The largest published file is CIFAR-100's train, of 148 MiB.
_LARGEST_FILE = 1 << 28


@dataclass(frozen=True)
class _Form:
    """The files of one published form; ``archive`` holds them in ``folder``.

    A pickled batch has its labels under the name ``labels``, the pickled ``meta`` the names of the
    classes under ``names``. A plain record has ``label_bytes`` in front of its pixels, of which
    byte ``label`` counts.
    """

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    pickled: bool
    labels: str = "labels"
    names: str = "label_names"
    label_bytes: int = 1
    label: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, *self.test, self.meta)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR10 = {
    "python": _Form(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        _BATCHES,
        ("test_batch",),
        "batches.meta",
        pickled=True,
    ),
    "binary": _Form(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        tuple(f"{name}.bin" for name in _BATCHES),
        ("test_batch.bin",),
        "batches.meta.txt",
        pickled=False,
    ),
}
_CIFAR100 = {
    labels: (
        _Form(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            ("train",),
            ("test",),
            "meta",
            pickled=True,
            labels=f"{labels}_labels",
            names=f"{labels}_label_names",
        ),
        _Form(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            ("train.bin",),
            ("test.bin",),
            f"{labels}_label_names.txt",
            pickled=False,
            label_bytes=2,
            label=("coarse", "fine").index(labels),
        ),
    )
    for labels in ("fine", "coarse")
}


def load_cifar10(root: Path | None = None, *, download: bool = True) -> ImageDataset:
    """Loads CIFAR-10 from the first place that has it.

    The places, in order: ``root`` (the files, the folder they unpack to, or an archive, in either
    form), the cache of an earlier download, torchvision's downloader (into ``root``, else into the
    cache). The names of the classes are those that the files say.

    Raises:
        DatasetNotFoundError: no place has the files.
        DatasetError: a place has them, but a file is missing or damaged.
    """
    return _load("CIFAR10", tuple(_CIFAR10.values()), root, download)


def load_cifar100(
    root: Path | None = None, *, labels: Literal["fine", "coarse"] = "fine", download: bool = True
) -> ImageDataset:
    """Loads CIFAR-100, as :func:`load_cifar10` does CIFAR-10.

    Args:
        labels: the 100 "fine" classes or the 20 "coarse" ones.

    Raises:
        DatasetNotFoundError: no place has the files.
        DatasetError: a place has them, but a file is missing or damaged.
    """
    if labels not in _CIFAR100:
        raise DatasetError(f"expected labels to be fine or coarse, got {labels!r}")
    return _load("CIFAR100", _CIFAR100[labels], root, download)


def recognises_cifar10(folder: Path) -> bool:
    """Whether ``folder`` has CIFAR-10 in any form, or is its archive."""
    return _find([folder], tuple(_CIFAR10.values())) is not None


def recognises_cifar100(folder: Path) -> bool:
    """Whether ``folder`` has CIFAR-100 in any form, or is its archive."""
    return _find([folder], _CIFAR100["fine"]) is not None


def read_cifar10(folder: Path) -> ImageDataset:
    """Reads CIFAR-10 from ``folder``, or from the archive that it is, and from nowhere else.

    Raises:
        DatasetError: it is not there, or a file is missing or damaged.
    """
    return _read("CIFAR10", [folder], tuple(_CIFAR10.values()))


def read_cifar100(folder: Path) -> ImageDataset:
    """Reads CIFAR-100 with its fine labels, as :func:`read_cifar10` does CIFAR-10.

    Raises:
        DatasetError: it is not there, or a file is missing or damaged.
    """
    return _read("CIFAR100", [folder], _CIFAR100["fine"])


def _load(name: str, forms: Sequence[_Form], root: Path | None, download: bool) -> ImageDataset:
    places = [cache_folder()] if root is None else [root, cache_folder()]
    reason = "download switched off"
    if download and _find(places, forms) is None:
        try:
            torchvision_download(name, places[0])
        except (OSError, RuntimeError) as error:
            reason = f"download failed: {error}"
    return _read(name, places, forms, reason=f"; {reason}")


def _read(
    name: str, places: Sequence[Path], forms: Sequence[_Form], *, reason: str = ""
) -> ImageDataset:
    found = _find(places, forms)
    if found is None:
        wanted = " or ".join(form.folder for form in forms)
        looked_in = ", ".join(map(str, places))
        raise DatasetNotFoundError(f"expected {wanted}, got none in {looked_in}{reason}")
    source, form = found
    contents = _read_archive(source, form) if source.is_file() else _read_folder(source, form)
    classes, *batches = read_all(
        str(source),
        [
            partial(_read_names, source / form.meta, contents[form.meta], form),
            *(
                partial(_read_batch, source / file, contents[file], form)
                for file in (*form.train, *form.test)
            ),
        ],
    )
    return ImageDataset(
        name=name.lower(),
        train=_joined(batches[: len(form.train)]),
        test=_joined(batches[len(form.train) :]),
        classes=classes,
        source=str(source),
    )


def _find(places: Sequence[Path], forms: Sequence[_Form]) -> tuple[Path, _Form] | None:
    """The first folder or archive that has the files of a form: a place itself, or one in it."""
    for place in places:
        for form in forms:
            for folder in (place / form.folder, place):
                # CIFAR-100's files have such common names that all of them must be there.
                files = form.files if len(form.train) == 1 else form.train[:1]
                if all((folder / name).is_file() for name in files):
                    return folder, form
        for form in forms:
            for archive in (place / form.archive, place):
                if archive.name == form.archive and archive.is_file():
                    return archive, form
    return None


def _read_folder(folder: Path, form: _Form) -> dict[str, bytes]:
    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            message = f"expected a readable file, got: {error.strerror}"
            raise DatasetError.at(path, message) from error

    readers = [partial(read, folder / name) for name in form.files]
    return dict(zip(form.files, read_all(str(folder), readers), strict=True))


def _read_archive(path: Path, form: _Form) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in form.files or not member.isfile():
                    continue
                if member.size > _LARGEST_FILE:
                    raise DatasetError.at(
                        path / name, f"expected at most {_LARGEST_FILE} bytes, got {member.size}"
                    )
                contents[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DatasetError.at(path, f"expected an intact archive, got: {error}") from error
    missing = [name for name in form.files if name not in contents]
    if missing:
        message = f"expected the files {', '.join(form.files)}, got none of {', '.join(missing)}"
        raise DatasetError.at(path, message)
    return contents


def _read_names(path: Path, content: bytes, form: _Form) -> tuple[str, ...]:
    if form.pickled:
        names = load_batch(content, path).get(form.names)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DatasetError.at(path, f"expected a list of names as {form.names}, got {names!r}")
    else:
        try:
            names = content.decode().split("\n")
        except UnicodeDecodeError as error:
            raise DatasetError.at(path, f"expected a name a line, got: {error}") from error
        names = [name.strip() for name in names if name.strip()]
    if not names:
        raise DatasetError.at(path, "expected the names of the classes, got none")
    return tuple(names)


def _read_batch(path: Path, content: bytes, form: _Form) -> ImageSet:
    """The images and labels of one file."""
    if form.pickled:
        batch = load_batch(content, path)
        pixels, labels = batch.get("data"), batch.get(form.labels)
        if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (_PIXELS,):
            got = list(pixels.shape) if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise DatasetError.at(path, f"expected data of shape [N, {_PIXELS}], got {got}")
        if not isinstance(labels, list) or any(type(label) is not int for label in labels):
            raise DatasetError.at(path, f"expected {form.labels} as a list of integers, got other")
        if len(labels) != len(pixels):
            message = f"expected {len(pixels)} {form.labels}, one an image, got {len(labels)}"
            raise DatasetError.at(path, message)
    else:
        size = form.label_bytes + _PIXELS
        if len(content) % size:
            message = f"expected a whole number of records of {size} bytes, got {len(content)}"
            raise DatasetError.at(path, f"{message} bytes")
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        pixels, labels = records[:, form.label_bytes :], records[:, form.label]
    images = pixels.reshape(-1, 3, _SIZE, _SIZE).transpose(0, 2, 3, 1)
    return ImageSet(
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.from_numpy(np.asarray(labels, dtype=np.int64)),
    )


def _joined(batches: Sequence[ImageSet]) -> ImageSet:
    return ImageSet(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    )


def write_cifar10(
    dataset: ImageDataset, folder: Path, *, form: Literal["python", "binary"] = "python"
) -> Path:
    """Writes a data set of small images as CIFAR-10's files, for whatever reads those.

    Images of 28x28 get a border of two black pixels, and grey ones become colour. The training
    part is cut into five batches. What is written is not CIFAR-10 unless ``dataset`` is: the names
    of the classes, which every reader can ask for, are those of ``dataset``.

    Args:
        folder: where the folder ``cifar-10-batches-py`` or ``cifar-10-batches-bin`` goes.

    Returns:
        That folder.

    Raises:
        DatasetError: images are not of 28x28 or 32x32 pixels in 1 or 3 channels, or there are
            fewer than five in the training part, or more than 256 classes.
    """
    if form not in _CIFAR10:
        raise DatasetError(f"expected a form of python or binary, got {form!r}")
    if len(dataset.train) < len(_BATCHES):
        raise DatasetError(f"expected at least 5 training images, got {len(dataset.train)}")
    if len(dataset.classes) > 256 or any("\n" in name for name in dataset.classes):
        raise DatasetError("expected at most 256 classes, with names of one line each")
    files = _CIFAR10[form]
    target = folder / files.folder
    target.mkdir(parents=True, exist_ok=True)
    indices = torch.arange(len(dataset.train)).tensor_split(len(_BATCHES))
    batches = [
        (name, f"training batch {number} of {len(_BATCHES)}", dataset.train.subset(part))
        for number, (name, part) in enumerate(zip(files.train, indices, strict=True), start=1)
    ]
    batches.append((files.test[0], "testing batch 1 of 1", dataset.test))
    for name, title, image_set in batches:
        pixels, labels = _cifar_pixels(image_set), image_set.labels
        if files.pickled:
            names = [f"{dataset.name}_{index:06}.png" for index in range(len(labels))]
            batch = {"batch_label": title, "labels": labels.tolist(), "data": pixels}
            content = dump_batch({**batch, "filenames": names})
        else:
            column = labels.numpy().astype(np.uint8)[:, None]
            content = np.concatenate((column, pixels), axis=1).tobytes()
        (target / name).write_bytes(content)
    if files.pickled:
        meta = dump_batch(
            {
                "num_cases_per_batch": len(indices[0]),
                "label_names": list(dataset.classes),
                "num_vis": _PIXELS,
            }
        )
    else:
        meta = "".join(f"{name}\n" for name in dataset.classes).encode()
    (target / files.meta).write_bytes(meta)
    return target


def _cifar_pixels(image_set: ImageSet) -> np.ndarray:
    """uint8 [N, 3072]: the rows of the red channel, of the green one, of the blue one."""
    height, width, channels = image_set.images.shape[1:]
    if (height, width) not in ((28, 28), (_SIZE, _SIZE)) or channels not in (1, 3):
        raise DatasetError(
            f"expected images of 28x28 or {_SIZE}x{_SIZE} pixels in 1 or 3 channels, got "
            f"{height}x{width} in {channels}"
        )
    border = (_SIZE - height) // 2
    images = F.pad(image_set.images, (0, 0, border, border, border, border))
    return images.expand(-1, -1, -1, 3).permute(0, 3, 1, 2).reshape(-1, _PIXELS).numpy()
