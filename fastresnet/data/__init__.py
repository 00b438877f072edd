# SPDX-License-Identifier: Apache-2.0
"""Data sets, augmentation and loaders."""

from fastresnet.data.augment import Augment
from fastresnet.data.datasets import (
    DatasetError,
    DatasetNotFoundError,
    ImageDataset,
    ImageSet,
    load_digits,
    load_fashion_mnist,
)
from fastresnet.data.loader import TensorLoader

__all__ = [
    "Augment",
    "DatasetError",
    "DatasetNotFoundError",
    "ImageDataset",
    "ImageSet",
    "TensorLoader",
    "load_digits",
    "load_fashion_mnist",
]
