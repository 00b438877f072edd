# SPDX-License-Identifier: Apache-2.0
"""The DALI backend: NVIDIA's pipeline carries out what our description and our order say.

DALI reads no files here and draws no numbers: each batch is fed to it, so that its order, its
augmentation and its treatment of bad files are those of the other backends, and (epoch, step) is
all its state. On a GPU it decodes with nvJPEG (``mixed``), else on the CPU.
"""

from __future__ import annotations

import importlib.util
import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastresnet.data.augment import NUMBERS, Augment, Choices, choose, turns
from fastresnet.data.backend import Backend, Slot
from fastresnet.data.decode import Header, as_plain, verify

# Of the images that the GPU decodes, the share that its JPEG engine takes where it has one, and
# the largest size it should reserve memory for: those of NVIDIA's ResNet-50 pipelines.
_HARDWARE_DECODER = {
    "hw_decoder_load": 0.65,
    "preallocate_width_hint": 5980,
    "preallocate_height_hint": 6430,
}


def dali_missing() -> str | None:
    """Why DALI cannot be used, or None."""
    # Its parent package is shared with others, and need not exist either.
    parent = importlib.util.find_spec("nvidia")
    if parent is None or importlib.util.find_spec("nvidia.dali") is None:
        return "expected the package nvidia-dali-cuda130: pip install 'fastresnet[dali]'"
    return None


class DaliBackend(Backend):
    """Batches made by an NVIDIA DALI pipeline.

    Each file is verified once, by a decode at an eighth of its size: DALI itself would stop at a
    truncated one, and show a damaged one. A file that DALI would read by other rules than ours
    (CMYK, 16 bits, transparency) is handed to it as plain RGB.

    Args:
        device: a GPU, or the CPU.
        workers: threads that verify and decode.
        prefetch: batches in the making besides the one that is being used.

    Raises:
        ValueError: DALI is not installed.
    """

    name = "dali"

    def __init__(self, *, device: torch.device, workers: int, prefetch: int) -> None:
        missing = dali_missing()
        if missing:
            raise ValueError(f"backend='dali': {missing}")
        self._device = device
        self._workers = workers
        self._prefetch = prefetch
        self._headers: dict[int, Header] = {}  # of the files that were verified

    def batches(
        self,
        requests: Iterable[list[Slot]],
        augment: Augment,
        *,
        size: tuple[int, int],
        dtype: torch.dtype,
        pinned: bool,
    ) -> Iterator[tuple[Tensor, list[int | None]]]:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        requests = iter(requests)
        first = next(requests, None)
        if first is None:
            return
        names = _inputs(augment)
        shown: deque[list[int | None]] = deque()  # of the batches that the pipeline has taken

        def feed() -> Iterator[tuple[list[np.ndarray], ...]]:
            for slots in chain([first], requests):
                filled = pool.map(partial(self._fill, augment=augment, size=size), slots)
                indices, samples = zip(*filled, strict=True)
                shown.append(list(indices))
                yield tuple([getattr(sample, name) for sample in samples] for name in names)

        with ThreadPoolExecutor(self._workers, thread_name_prefix="fastresnet-dali") as pool:
            # No batch of an epoch is larger than its first.
            pipeline = self._pipeline(feed(), augment, size=size, batch_size=len(first))
            while True:
                try:
                    (out,) = pipeline.run()
                except StopIteration:
                    return
                made = torch.empty((len(out), *size, 3), device=self._device)
                feed_ndarray(out.as_tensor(), made)
                yield made.permute(0, 3, 1, 2).to(dtype), shown.popleft()

    def _fill(self, slot: Slot, *, augment: Augment, size: tuple[int, int]) -> tuple:
        """The index that fills a slot and what the pipeline takes for it."""
        samples: list[_Sample] = []

        def use(index: int, data: bytes, numbers: np.ndarray) -> None:
            header = self._headers.get(index)
            if header is None:
                header = self._headers[index] = verify(data)
            upright = (header.upright_height, header.upright_width)
            choices = choose(augment, np.array([upright]), numbers[None])
            samples.append(_sample(as_plain(data, header), upright, choices, size))

        index = slot(use)
        return index, samples[0] if samples else self._black_sample(augment, size)

    def _black_sample(self, augment: Augment, size: tuple[int, int]) -> _Sample:
        """For a slot that stays black: the pipeline must be given something."""
        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "PNG")
        choices = choose(augment, np.array([[8, 8]]), np.full((1, NUMBERS), 0.5))
        return _sample(picture.getvalue(), (8, 8), choices, size)

    def _pipeline(
        self, feed: Iterator, augment: Augment, *, size: tuple[int, int], batch_size: int
    ):
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self._device.type == "cuda"
        scale, shift = augment.normalisation(3)

        @pipeline_def(
            batch_size=batch_size,
            num_threads=self._workers,
            device_id=self._device.index or 0 if on_gpu else None,
            prefetch_queue_depth=self._prefetch + 1,
        )
        def pipeline():
            names = _inputs(augment)
            fed = fn.external_source(source=feed, num_outputs=len(names))
            inputs = SimpleNamespace(**dict(zip(names, fed, strict=True)))
            images = fn.decoders.image_slice(
                inputs.encoded,
                start=inputs.start,
                shape=inputs.shape,
                axes=[0, 1],
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # as libjpeg does
                **(_HARDWARE_DECODER if on_gpu else {}),
            )
            images = fn.slice(
                images,
                start=inputs.frame_start,
                shape=inputs.frame_shape,
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=0,
            )
            bilinear = {"interp_type": types.INTERP_LINEAR}
            images = fn.resize(images, size=size, antialias=True, **bilinear)
            if augment.turns:
                images = fn.warp_affine(
                    images,
                    matrix=inputs.turn,
                    inverse_map=True,
                    fill_value=0,
                    size=size,
                    **bilinear,
                )
            if augment.changes_colour:
                images = fn.color_twist(
                    images,
                    brightness=inputs.brightness,
                    contrast=inputs.contrast,
                    saturation=inputs.saturation,
                    hue=inputs.hue,
                )
            return fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT,
                output_layout="HWC",
                mean=(-shift / scale).tolist(),
                std=(1 / scale).tolist(),
            )

        built = pipeline()
        built.build()
        return built


class _Sample(NamedTuple):
    """What the pipeline takes for an image.

    The part of the image that is decoded, ``start`` and ``shape`` (rows, columns), and the crop
    as a part of that, which may reach beyond it.
    """

    encoded: np.ndarray
    start: np.ndarray
    shape: np.ndarray
    frame_start: np.ndarray
    frame_shape: np.ndarray
    turn: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray  # in degrees


def _inputs(augment: Augment) -> tuple[str, ...]:
    """The fields of a sample that the pipeline uses."""
    names = _Sample._fields
    return (
        *names[: names.index("turn")],
        *(("turn",) if augment.turns else ()),
        *(names[names.index("brightness") :] if augment.changes_colour else ()),
    )


def _sample(
    encoded: bytes, upright: tuple[int, int], choices: Choices, size: tuple[int, int]
) -> _Sample:
    box = choices.boxes[0].astype(np.int32)
    begin, end = box[1::-1], box[:1:-1]
    # A crop that misses the image altogether still needs a pixel to be decoded.
    inner_begin = np.clip(begin, 0, np.int32(upright) - 1)
    inner_end = np.clip(end, inner_begin + 1, np.int32(upright))
    return _Sample(
        encoded=np.frombuffer(encoded, dtype=np.uint8),
        start=inner_begin,
        shape=inner_end - inner_begin,
        frame_start=begin - inner_begin,
        frame_shape=end - begin,
        turn=turns(choices, size=size)[0].astype(np.float32),
        brightness=np.float32(choices.brightness[0]),
        contrast=np.float32(choices.contrast[0]),
        saturation=np.float32(choices.saturation[0]),
        hue=np.float32(choices.hues[0] * 360),
    )
