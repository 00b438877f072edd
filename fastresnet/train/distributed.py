# SPDX-License-Identifier: Apache-2.0
"""The processes of a run, as torchrun starts them: one is a run of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among those of the run; without a process group, the only one."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None  # of the CPU, for what is no tensor of the device

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def interleave(self, batches: list[Any]) -> list[Any]:
        """The batches of all processes in the order of the data: the first of each process, the
        second of each, and so on, as sharded loaders deal them out."""
        if self.size == 1:
            return batches
        gathered: list[list[Any]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, batches, group=self.control)
        return [batch for batch in chain(*zip_longest(*gathered)) if batch is not None]

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier(group=self.control)


@contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """The world that torchrun's variables describe: NCCL's for a GPU, else gloo's.

    A GPU's process takes the one of its ``LOCAL_RANK`` as the current device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        control = dist.new_group(backend="gloo")
    else:
        dist.init_process_group("gloo")
        control = dist.group.WORLD
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), control=control)
    finally:
        dist.destroy_process_group()
