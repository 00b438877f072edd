# SPDX-License-Identifier: Apache-2.0
"""One function that makes a loader: it picks what suits the data set and the machine."""

from __future__ import annotations

import os
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastresnet.data.augment import Augment
from fastresnet.data.backend import Backend
from fastresnet.data.dali import DaliBackend, dali_missing
from fastresnet.data.datasets.file_set import FileSet
from fastresnet.data.datasets.image_set import ImageSet
from fastresnet.data.faults import OnError
from fastresnet.data.file_loader import FileLoader
from fastresnet.data.loader import Loader
from fastresnet.data.native import NativeBackend
from fastresnet.data.reference import TorchvisionBackend
from fastresnet.data.tensor_loader import TensorLoader

BackendName = Literal["auto", "dali", "native", "torchvision"]


def make_loader(
    dataset: FileSet | ImageSet,
    augment: Augment,
    batch_size: int,
    *,
    backend: BackendName = "auto",
    training: bool,
    seed: int = 0,
    drop_last: bool = False,
    shard: int = 0,
    num_shards: int = 1,
    weights: Tensor | np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    prefetch: int = 2,
    on_error: OnError = "raise",
    error_limit: float = 0.01,
) -> Loader:
    """Makes a loader that yields (images, labels): [B, C, H, W] in channels_last, and int64 [B].

    The same seed gives the same images in the same order with the same augmentation, whatever the
    backend, the number of shards and workers, and where an epoch was taken up again.

    Args:
        dataset: files, or images in memory (which need no backend).
        augment: what is done to an image.
        batch_size: images in a batch.
        backend: ``"dali"`` (NVIDIA DALI, on the GPU where ``device`` is one), ``"native"``
            (libjpeg-turbo and :func:`fastresnet.ops.warp`), ``"torchvision"`` (the reference), or
            ``"auto"``: DALI for a GPU where it is installed, else native.
            ``loader.description`` says which it became, and why.
        training: shuffle and augment at random.
        seed: the seed of order and augmentation.
        drop_last: leave out what does not fill a batch.
        shard, num_shards: which part of each step's images is this loader's
            (:class:`fastresnet.data.order.Order`).
        weights: in training, how often each image comes, relative to the others, float [N], as
            torch's WeightedRandomSampler takes them; :func:`balancing_weights` makes those with
            which each class comes as often as another. None: each once an epoch.
        dtype: of the images, float32 or bfloat16.
        device: where the batches go.
        workers: threads (default: as many as this process may use processors).
        prefetch: batches in the making besides the one that is being used.
        on_error, error_limit: what becomes of files that cannot be used
            (:class:`fastresnet.data.faults.Faults`).

    Raises:
        ValueError: a number or a name is not one of those above, or a package is missing; the
            message says which one to install.
    """
    if backend not in get_args(BackendName):
        expected = ", ".join(get_args(BackendName))
        raise ValueError(f"expected backend to be one of {expected}, got {backend!r}")
    device = torch.device(device)
    common = {
        "batch_size": batch_size,
        "training": training,
        "seed": seed,
        "drop_last": drop_last,
        "shard": shard,
        "num_shards": num_shards,
        "weights": None if weights is None else np.asarray(weights, dtype=np.float64),
        "dtype": dtype,
        "device": device,
    }
    if isinstance(dataset, ImageSet):
        return TensorLoader(dataset, augment, **common)
    workers = workers or len(os.sched_getaffinity(0))
    name, reason = choose_backend(backend, device)
    return FileLoader(
        dataset,
        augment,
        backend=_make_backend(name, device, workers=workers, prefetch=prefetch),
        description=f"{name} ({reason}), {workers} threads",
        on_error=on_error,
        error_limit=error_limit,
        **common,
    )


def choose_backend(name: BackendName, device: torch.device) -> tuple[str, str]:
    """The backend that ``name`` becomes for batches on ``device``, and why."""
    if name != "auto":
        return name, "as asked for"
    if device.type != "cuda":
        return "native", "the fastest for a CPU"
    missing = dali_missing()
    if missing:
        return "native", f"for DALI on the GPU, {missing}"
    return "dali", "decodes on the GPU"


def _make_backend(name: str, device: torch.device, *, workers: int, prefetch: int) -> Backend:
    if name == "dali":
        return DaliBackend(device=device, workers=workers, prefetch=prefetch)
    kind = {"native": NativeBackend, "torchvision": TorchvisionBackend}[name]
    return kind(workers=workers, prefetch=prefetch)
