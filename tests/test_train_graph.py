# SPDX-License-Identifier: Apache-2.0
"""Steps recorded and replayed: everything around a CUDA graph, with a stand-in on the CPU that
keeps its promises: recording does nothing, and a replay writes where the recorded run wrote."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from stand_in_graphs import StandIn
from torch import Tensor, nn

from fastresnet.data import Augment, ImageSet, TensorLoader
from fastresnet.train import RECIPES, ConfigError, Recipe, apply_overrides
from fastresnet.train.distributed import World
from fastresnet.train.graph import CapturedBackward, check_recordable
from fastresnet.train.loop import Trainer
from fastresnet.train.objective import Objective

CLASSES = 4


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(*overrides: str) -> Recipe:
    settings = ["schedule.epochs=2", "schedule.sizes=", "augment.size=8", "augment.padding=0"]
    settings += ["amp=none", "tensorboard=false", "log_every=0", "device=auto"]
    return apply_overrides(RECIPES["fashion-mnist"](), [*settings, *overrides])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32, CLASSES),
    )


def loader(*, training: bool) -> TensorLoader:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (64, 8, 8, 1), dtype=torch.uint8, generator=generator)
    images = ImageSet(pixels, torch.arange(64) % CLASSES)
    augment = Augment(size=8, mean=(0.5,), std=(0.3,))
    return TensorLoader(images, augment, batch_size=16, training=training)


def trainer(folder: Path, config: Recipe, *, stand_in: bool) -> Trainer:
    folder.mkdir(exist_ok=True)
    model = network()
    return Trainer(
        model,
        loader(training=True),
        loader(training=False),
        config,
        Objective(config.loss, torch.arange(64) % CLASSES, classes=CLASSES),
        folder=folder,
        console=Console(file=io.StringIO()),
        graphs=StandIn(model) if stand_in else None,
    )


def graphs_of(training: Trainer) -> StandIn:
    return training._captured._graphs


WAYS = [
    (),
    ("optim.accumulate=3", "optim.clip_norm=0.5"),  # three batches a step, then the one left over
    ("amp=bf16",),
    ("amp=fp16", "optim.accumulate=2"),
    ("amp=fp16", "optim.clip_norm=0.5"),
    ("mix.mixup=0.4", "mix.cutmix=1"),
    ("ema=0.9", "loss.class_weights=balanced"),
    ("optim.kind=adam", "optim.lr=0.01"),
    ("optim.kind=adagrad", "optim.lr=0.01"),
]


@pytest.mark.parametrize("overrides", WAYS, ids=str)
def test_a_replayed_step_is_the_step(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    plain = trainer(tmp_path / "plain", recipe(*overrides), stand_in=False)
    config = recipe(*overrides, "cuda_graph=true")
    graphed = trainer(tmp_path / "graphed", config, stand_in=True)
    rows = [training.fit().rows for training in (plain, graphed)]
    assert [row.train_loss for row in rows[0]] == [row.train_loss for row in rows[1]]
    assert [row.val_loss for row in rows[0]] == [row.val_loss for row in rows[1]]
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, graphed.model.state_dict()[name]), name
    graphs = graphs_of(graphed)
    assert graphs.replayed == 8
    assert graphs.captured == (2 if config.optim.accumulate > 1 else 1)


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    config = recipe("cuda_graph=true", "checkpoint.every_steps=1", "amp=fp16")
    whole = trainer(tmp_path / "whole", config, stand_in=True)
    whole.fit()
    first = trainer(tmp_path / "part", config, stand_in=True)
    first._captured = counted(first, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = trainer(tmp_path / "part", config, stand_in=True)
    second.resume()
    second.fit()
    assert graphs_of(second).replayed == 5
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def counted(training: Trainer, stop_at: int):
    """The trainer's captured step, with an interruption behind so many calls."""
    captured, calls = training._captured, []

    def call(*args, **options):
        calls.append(1)
        if len(calls) == stop_at:
            training.interruption.requested = True
        return captured(*args, **options)

    return call


def test_recording_leaves_no_trace() -> None:
    model = network()

    def backward(images: Tensor, targets: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(images)
        loss = F.cross_entropy(outputs, targets)
        (loss / count).backward()
        return loss.detach(), outputs.detach().argmax(1)

    images, targets = torch.randn(6, 1, 8, 8), torch.arange(6) % CLASSES
    with torch.random.fork_rng([]):
        loss, _ = backward(images, targets, torch.tensor(2.0))
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    statistics = [buffer.clone() for buffer in model.buffers()]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    model.zero_grad()
    step = CapturedBackward(backward, model, StandIn(model))
    found, predictions = step(images, targets, count=2, first=True)
    assert torch.equal(found, loss)
    assert predictions.shape == (6,)
    assert all(map(torch.equal, expected, (p.grad for p in model.parameters())))
    assert all(map(torch.equal, statistics, model.buffers()))

    with pytest.raises(
        ValueError, match=r"expected images of \(6, 1, 8, 8\) torch.float32 as reco"
    ):
        step(images[:4], targets[:4], count=1, first=True)
    with pytest.raises(
        ValueError, match=r"expected targets of \(6,\) torch.int64 .*, got \(6, 4\)"
    ):
        step(images, torch.rand(6, 4), count=1, first=True)


def test_what_cannot_be_recorded_is_told(tmp_path: Path) -> None:
    class Refusing(StandIn):
        def capture(self, work):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    training = trainer(tmp_path, recipe("cuda_graph=true"), stand_in=True)
    training._captured._graphs = Refusing(training.model)
    with pytest.raises(ConfigError, match=r"cuda_graph: .* 'CUDA error: operation not permitted"):
        training.fit()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("device=cpu",), "cuda_graph: expected false on the CPU"),
        (("schedule.sizes=4,8",), "schedule.sizes: expected one size where cuda_graph is true"),
        (("mix.mixup=0.2", "mix.probability=0.5"), "mix.probability: expected 0 or 1"),
    ],
)
def test_recipes_that_cannot_be_recorded(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe("cuda_graph=true", *overrides)
    recipe(*overrides)


def test_other_devices_and_several_processes_are_refused(tmp_path: Path) -> None:
    config = recipe("cuda_graph=true")
    with pytest.raises(ConfigError, match="cuda_graph: expected a GPU to train on, got device cpu"):
        trainer(tmp_path, config, stand_in=False)
    with pytest.raises(ConfigError, match="cuda_graph: expected a single process, got 2"):
        check_recordable(torch.device("cuda"), World(rank=0, size=2))
    check_recordable(torch.device("cuda"), World())
