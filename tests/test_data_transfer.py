# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastresnet.data.transfer import to_device


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for number in range(count):
        yield torch.full((2, 3), float(number)), torch.full((2,), number)


def test_on_the_cpu_batches_stay_what_they_are() -> None:
    given = list(batches(3))
    got = list(to_device(given, torch.device("cpu")))
    assert all(
        a is b
        for pair, same in zip(given, got, strict=True)
        for a, b in zip(pair, same, strict=True)
    )


@pytest.mark.parametrize("count", [0, 1, 4])
def test_on_a_gpu_one_batch_is_copied_ahead(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls around a GPU's copies, with a stand-in for torch.cuda and for the copy itself."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            events.append(f"enter {self.name}")

        def __exit__(self, *_: object) -> None:
            events.append(f"leave {self.name}")

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    class Copied:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def to(self, device: torch.device, *, non_blocking: bool) -> Copied:
            assert non_blocking
            events.append("copy")
            return self

        def record_stream(self, stream: Stream) -> None:
            events.append(f"record {stream.name}")

    main = Stream("main")
    fake = SimpleNamespace(
        Stream=lambda device: Stream("copies"),
        stream=lambda stream: stream,
        current_stream=lambda device: main,
    )
    monkeypatch.setattr("fastresnet.data.transfer.torch.cuda", fake)
    source = (tuple(map(Copied, batch)) for batch in batches(count))
    got = []
    for images, _ in to_device(source, torch.device("cuda")):
        events.append(f"use {int(images.tensor[0, 0])}")
        got.append(int(images.tensor[0, 0]))
    assert got == list(range(count))
    assert events.count("copy") == 2 * count
    # Each copy is waited for, and its memory belongs to the stream that uses it.
    assert events.count("main waits for copies") == count
    assert events.count("record main") == 2 * count
    if count > 1:
        assert events.index("use 0") > [i for i, e in enumerate(events) if e == "copy"][3]
