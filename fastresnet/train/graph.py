# SPDX-License-Identifier: Apache-2.0
"""A training step's forward and backward as a CUDA graph: recorded once, then replayed as one
launch where there were hundreds, which small batches wait for.

What the step reads and writes lies at fixed addresses: the inputs are copied to where the recorded
ones were, and loss, predictions and gradients appear where they appeared first. The optimiser comes
behind, not recorded: its learning rate changes, and torch's fused ones are a few launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fastresnet.train.config import ConfigError
from fastresnet.train.distributed import World

_WARM_UPS = 3  # libraries choose algorithms and allocate what they keep at the first ones

# (images, targets, how many batches make the step) -> (loss, predictions), the gradients added to
# those of the parameters.
Backward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Graphs(Protocol):
    """How work is recorded on a device."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Does the work a few times, apart from what is in progress."""

    def capture(
        self, work: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """Records the work, without doing it.

        Returns:
            What does it, and the tensors that hold its results each time.
        """


class CudaGraphs:
    """CUDA's own; all graphs of one object share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: tuple[int, int] | None = None

    def warm_up(self, work: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        current.wait_stream(stream)

    def capture(
        self, work: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            results = work()
        self._pool = graph.pool()
        return graph.replay, results


def check_recordable(device: torch.device, world: World) -> None:
    """Whether a step on the device can be recorded, whatever it is made of.

    Raises:
        ConfigError: it is no GPU, or there are several processes.
    """
    if device.type != "cuda":
        raise ConfigError(f"cuda_graph: expected a GPU to train on, got device {device.type}")
    if world.size > 1:
        raise ConfigError(f"cuda_graph: expected a single process, got {world.size}")


class CapturedBackward:
    """``backward`` recorded at its first call and replayed from then on.

    Args:
        backward: forward, loss and backward of a batch.
        model: the network, whose buffers the recording leaves as they are.
        graphs: what records.
    """

    def __init__(self, backward: Backward, model: nn.Module, graphs: Graphs) -> None:
        self._backward = backward
        self._model = model
        self._graphs = graphs
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._gradients: list[Tensor | None] = []
        # By whether the batch is a step's first: that one writes the gradients, others add to them.
        self._recorded: dict[bool, tuple[Callable[[], None], tuple[Tensor, Tensor]]] = {}

    def __call__(
        self, images: Tensor, targets: Tensor, *, count: int, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss and predictions of a batch; they are overwritten by the next call.

        The gradients are the parameters' then: written if ``first``, else added to those there.

        Args:
            images: [B, C, S, S].
            targets: labels or shares of classes.
            count: how many batches make the step.

        Raises:
            ConfigError: the step cannot be recorded.
            ValueError: shapes or types are not those that were recorded.
        """
        if self._inputs is None:
            self._warm_up(images, targets)
        for name, static, value in zip(
            ("images", "targets"), self._inputs, (images, targets), strict=False
        ):
            if (static.shape, static.dtype) != (value.shape, value.dtype):
                raise ValueError(
                    f"cuda_graph: expected {name} of {tuple(static.shape)} {static.dtype} as "
                    f"recorded, got {tuple(value.shape)} {value.dtype}"
                )
            static.copy_(value, non_blocking=True)
        self._inputs[2].fill_(count)
        if first not in self._recorded:
            self._record(first)
        elif first:
            for parameter, gradient in zip(self._model.parameters(), self._gradients, strict=True):
                parameter.grad = gradient
        replay, results = self._recorded[first]
        replay()
        return results

    def _warm_up(self, images: Tensor, targets: Tensor) -> None:
        device = images.device
        self._inputs = (
            torch.empty_like(images).copy_(images),
            torch.empty_like(targets).copy_(targets),
            torch.ones((), device=device),
        )
        buffers = [buffer.clone() for buffer in self._model.buffers()]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._graphs.warm_up(lambda: self._backward(*self._inputs))
        for buffer, saved in zip(self._model.buffers(), buffers, strict=True):
            buffer.copy_(saved)

    def _record(self, first: bool) -> None:
        if first:
            self._model.zero_grad(set_to_none=True)
        try:
            self._recorded[first] = self._graphs.capture(lambda: self._backward(*self._inputs))
        except RuntimeError as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"cuda_graph: expected a step that can be recorded, got {line!r}; set "
                "cuda_graph=false"
            ) from error
        if first:
            self._gradients = [parameter.grad for parameter in self._model.parameters()]
