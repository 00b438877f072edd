# SPDX-License-Identifier: Apache-2.0
"""Data sets, one file each; every loader returns an :class:`ImageDataset`."""

from fastresnet.data.datasets.digits import load_digits
from fastresnet.data.datasets.fashion_mnist import load_fashion_mnist
from fastresnet.data.datasets.image_set import (
    DatasetError,
    DatasetNotFoundError,
    ImageDataset,
    ImageSet,
)

__all__ = [
    "DatasetError",
    "DatasetNotFoundError",
    "ImageDataset",
    "ImageSet",
    "load_digits",
    "load_fashion_mnist",
]
