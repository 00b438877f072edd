# SPDX-License-Identifier: Apache-2.0
"""Data sets, one file each. Small ones are read whole into memory (:class:`ImageDataset`), those of
image files list their files (:class:`FileDataset`)."""

from fastresnet.data.datasets.cifar import load_cifar10, load_cifar100, write_cifar10
from fastresnet.data.datasets.digits import load_digits
from fastresnet.data.datasets.errors import DatasetError, DatasetNotFoundError, Problem
from fastresnet.data.datasets.fashion_mnist import load_fashion_mnist
from fastresnet.data.datasets.file_set import FileDataset, FileSet
from fastresnet.data.datasets.image_csv import load_image_csv, write_image_csv
from fastresnet.data.datasets.image_folder import load_image_folder
from fastresnet.data.datasets.image_set import ImageDataset, ImageSet
from fastresnet.data.datasets.mnist import load_mnist
from fastresnet.data.datasets.mnist_m import build_mnist_m, load_mnist_m, write_mnist_m
from fastresnet.data.datasets.registry import LAYOUTS, load_dataset, open_dataset
from fastresnet.data.datasets.retinopathy import load_retinopathy, write_retinopathy

__all__ = [
    "LAYOUTS",
    "DatasetError",
    "DatasetNotFoundError",
    "FileDataset",
    "FileSet",
    "ImageDataset",
    "ImageSet",
    "Problem",
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
    "open_dataset",
    "write_cifar10",
    "write_image_csv",
    "write_mnist_m",
    "write_retinopathy",
]
