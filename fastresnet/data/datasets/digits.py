# SPDX-License-Identifier: Apache-2.0
"""The 1,797 real handwritten digits that scikit-learn ships, for machines without a network."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from fastresnet.data.datasets.errors import DatasetError
from fastresnet.data.datasets.image_set import ImageDataset, ImageSet

_SIZE = 28
_TEST_IMAGES = 360


def load_digits() -> ImageDataset:
    """Loads the digits, enlarged from 8x8 to 28x28 pixels, with a fixed split of 1,437 + 360.

    Raises:
        DatasetError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_sklearn_digits
    except ImportError as error:
        raise DatasetError(
            "expected scikit-learn, which ships the digits, got: not installed "
            "(pip install scikit-learn)"
        ) from error

    digits = load_sklearn_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(small, size=_SIZE, mode="bicubic", align_corners=False)
    images = large.round_().clamp_(0, 255).to(torch.uint8).reshape(-1, _SIZE, _SIZE, 1)
    whole = ImageSet(images, torch.from_numpy(digits.target.astype(np.int64)))
    train, test = whole.split(_TEST_IMAGES / len(whole), seed=0)
    return ImageDataset(
        name="digits",
        train=train,
        test=test,
        classes=tuple(str(digit) for digit in range(10)),
        source="scikit-learn's handwritten digits",
    )
