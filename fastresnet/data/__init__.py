# SPDX-License-Identifier: Apache-2.0
"""Data sets, augmentation and loaders."""

from fastresnet.data.augment import Augment
from fastresnet.data.datasets import (
    LAYOUTS,
    DatasetError,
    DatasetNotFoundError,
    FileDataset,
    FileSet,
    ImageDataset,
    ImageSet,
    Problem,
    build_mnist_m,
    load_cifar10,
    load_cifar100,
    load_dataset,
    load_digits,
    load_fashion_mnist,
    load_image_csv,
    load_image_folder,
    load_mnist,
    load_mnist_m,
    load_retinopathy,
    open_dataset,
    write_cifar10,
    write_image_csv,
    write_mnist_m,
    write_retinopathy,
)
from fastresnet.data.decode import ImageError
from fastresnet.data.faults import Faults, TooManyFaultsError
from fastresnet.data.file_loader import FileLoader
from fastresnet.data.loader import Loader
from fastresnet.data.order import balancing_weights
from fastresnet.data.selection import make_loader
from fastresnet.data.tensor_loader import TensorLoader

__all__ = [
    "LAYOUTS",
    "Augment",
    "DatasetError",
    "DatasetNotFoundError",
    "Faults",
    "FileDataset",
    "FileLoader",
    "FileSet",
    "ImageDataset",
    "ImageError",
    "ImageSet",
    "Loader",
    "Problem",
    "TensorLoader",
    "TooManyFaultsError",
    "balancing_weights",
    "build_mnist_m",
    "load_cifar10",
    "load_cifar100",
    "load_dataset",
    "load_digits",
    "load_fashion_mnist",
    "load_image_csv",
    "load_image_folder",
    "load_mnist",
    "load_mnist_m",
    "load_retinopathy",
    "make_loader",
    "open_dataset",
    "write_cifar10",
    "write_image_csv",
    "write_mnist_m",
    "write_retinopathy",
]
