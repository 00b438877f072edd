# SPDX-License-Identifier: Apache-2.0
"""Which images are held out: every label in its share, and no group on both sides."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastresnet.data.datasets.errors import DatasetError


def hold_out(
    labels: Tensor, share: float, *, seed: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Holds out a share of the images, drawn by ``seed``, of each label in proportion.

    Without groups the held-out part has ``round(share * N)`` images, and of each label its share
    rounded up or down. Images of one group stay together, so with groups both are as near as
    whole groups allow.

    Args:
        labels: int64 [N], from 0 on.
        share: of the images, above 0 and below 1.
        groups: int64 [N], equal where images belong together, as those of one patient do.

    Returns:
        The indices of the rest and of the held-out images, int64, each in ascending order: only
        membership is random, the order stays that of the files.

    Raises:
        DatasetError: one of the two sides would be empty.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    if groups is None:
        held = _of_each_label(labels.numpy(), share, random)
    else:
        held = _of_each_group(labels.numpy(), groups.numpy(), share, random)
    if not 0 < held.sum() < len(labels):
        what = "images" if groups is None else "groups of images"
        raise DatasetError(
            f"expected a share that leaves {what} on both sides, got {share:g} of "
            f"{len(labels)} images"
        )
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def _of_each_label(labels: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    exact = np.bincount(labels) * share
    quotas = np.floor(exact).astype(np.int64)
    # The largest remainders are rounded up, until the parts add up to the whole's share.
    missing = max(round(share * len(labels)) - quotas.sum(), 0)
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    order = random.permutation(len(labels))
    held = np.zeros(len(labels), dtype=bool)
    for label, quota in enumerate(quotas):
        held[order[labels[order] == label][:quota]] = True
    return held


def _of_each_group(
    labels: np.ndarray, groups: np.ndarray, share: float, random: np.random.Generator
) -> np.ndarray:
    """Takes groups in random order: first those that bring no label above its share by more than
    they bring it nearer, then those that still bring the whole nearer to what is wanted.

    Nearness is the sum of squared gaps, each label's over its images and the whole's over all, so
    that a gap weighs as much in a rare label as in a common one.
    """
    names, members = np.unique(groups, return_inverse=True)
    images = np.zeros((len(names), labels.max(initial=0) + 1))
    np.add.at(images, (members, labels), 1)
    totals = images.sum(axis=0)
    weights = 1 / np.maximum(totals, 1)
    gaps = share * totals
    chosen = np.zeros(len(names), dtype=bool)
    order = random.permutation(len(names))
    for strict in (True, False):
        for group in order[~chosen[order]]:
            row = images[group]
            gains = row * (2 * gaps - row)  # by how much each squared gap would shrink
            size, gap = row.sum(), gaps.sum()
            gain = weights @ gains + size * (2 * gap - size) / len(labels)
            if gain > 0 and (not strict or (gains >= 0).all()):
                chosen[group] = True
                gaps -= row
    return chosen[members]
