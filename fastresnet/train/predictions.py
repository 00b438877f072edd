# SPDX-License-Identifier: Apache-2.0
"""The file of what a network predicted, image by image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from fastresnet.train.checkpoint import write_atomically
from fastresnet.train.metrics import Evaluation


def write_predictions(path: Path, evaluation: Evaluation, index: Tensor) -> None:
    """Writes ``probabilities`` (float32 [N, classes]), ``labels`` and ``index`` (int64 [N]), and
    the ``grades`` (float32 [N]) of a regression, as NumPy's compressed ``.npz``.

    Args:
        index: which image of the data set each one is, int64 [N].
    """
    arrays = {
        "probabilities": evaluation.probabilities.float().numpy(),
        "labels": evaluation.labels.numpy(),
        "index": index.numpy(),
    }
    if evaluation.grades is not None:
        arrays["grades"] = evaluation.grades.float().numpy()

    def write(temporary: Path) -> None:
        # Through a file: to a name NumPy would add a suffix.
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)
