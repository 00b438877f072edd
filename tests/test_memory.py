# SPDX-License-Identifier: Apache-2.0
"""Results on the CPU lie in memory of the library's own, which is used again."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastresnet
from fastresnet import ops
from fastresnet.memory import empty_images

CHANNELS = 64
LEAST_PIXELS = (128 << 10) // (4 * CHANNELS)  # of a float32 result that is kept


def result(pixels: int, value: float) -> Tensor:
    """A result of an operator, all of one value."""
    x = torch.full((1, CHANNELS, 1, pixels), value).contiguous(memory_format=torch.channels_last)
    zero, one = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    return ops.bn(x, zero, one - 1e-5, one, zero, training=False)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_of_a_dead_result_is_used_again():
    fastresnet.release_memory()
    first = result(4 * LEAST_PIXELS, 1.0)
    address = first.data_ptr()
    del first
    assert result(4 * LEAST_PIXELS, 2.0).data_ptr() == address


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 8 * LEAST_PIXELS), st.integers(0, 7)), min_size=1, max_size=25
    )
)
def test_live_results_do_not_share_memory(steps):
    alive: dict[int, tuple[Tensor, float]] = {}
    for value, (pixels, slot) in enumerate(steps):
        alive[slot] = result(pixels, float(value)), float(value)  # the slot's last one dies
        if value % 7 == 6:
            fastresnet.release_memory()
        for tensor, expected in alive.values():
            torch.testing.assert_close(tensor, torch.full_like(tensor, expected))


def test_results_of_many_threads():
    wrong = []

    def work(seed: int) -> None:
        kept = [result(LEAST_PIXELS * (1 + (seed + i) % 5), seed + i / 8) for i in range(8)]
        for i, tensor in enumerate(kept):
            if not torch.allclose(tensor, torch.tensor(seed + i / 8)):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_is_given_back_on_request():
    fastresnet.release_memory()
    large = result(1 << 18, 1.0)  # 64 MiB
    kept = result(4 * LEAST_PIXELS, 3.0)
    del large
    before = resident()
    assert fastresnet.release_memory() >= 64 << 20
    assert before - resident() > 56 << 20
    torch.testing.assert_close(kept, torch.full_like(kept, 3.0))


def test_a_result_is_a_tensor_like_any_other(tmp_path):
    x = result(4 * LEAST_PIXELS, 5.0)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.save(x, tmp_path / "x.pt")
    torch.testing.assert_close(torch.load(tmp_path / "x.pt"), x)
    numpy = x.numpy()
    del x
    assert (abs(numpy - 5) < 1e-4).all()
    small = result(1, 1.0)
    assert small.shape == (1, CHANNELS, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_lie_in_the_memory_of_results(dtype: torch.dtype) -> None:
    fastresnet.release_memory()
    images = empty_images(2, 3, (256, 300), dtype=dtype)
    assert images.shape == (2, 3, 256, 300)
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    address = images.data_ptr()
    del images
    assert empty_images(2, 3, (256, 300), dtype=dtype).data_ptr() == address
