# SPDX-License-Identifier: Apache-2.0
"""The loop on a network of a few thousand parameters: learns, resumes, tells of trouble."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastresnet.data import Augment, ImageSet, TensorLoader
from fastresnet.train import RECIPES, Recipe, apply_overrides
from fastresnet.train.checkpoint import CheckpointError, load_weights
from fastresnet.train.loop import EpochRow, History, Trainer, evaluate
from fastresnet.train.metrics import RunningMetrics

CLASSES = 4


def recipe(*overrides: str) -> Recipe:
    return apply_overrides(
        RECIPES["fashion-mnist"](),
        [
            "schedule.epochs=3",
            "schedule.sizes=4,8",
            "data.image_size=8",
            "data.padding=0",
            "label_smoothing=0",
            "amp=none",
            *overrides,
        ],
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )


def loader(count: int = 64, *, training: bool) -> TensorLoader:
    """Random images with random labels: nothing to learn but the images themselves."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 8, 8, 1), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    augment = Augment(size=8, mean=(0.5,), std=(0.3,))
    return TensorLoader(ImageSet(images, labels), augment, batch_size=16, training=training)


def trainer(folder: Path, config: Recipe, **changes: object) -> Trainer:
    arguments = {
        "model": network(),
        "train_loader": loader(training=True),
        "val_loader": loader(training=False),
        "console": Console(file=io.StringIO(), width=200),
        **changes,
    }
    folder.mkdir(exist_ok=True)
    return Trainer(
        arguments["model"],
        arguments["train_loader"],
        arguments["val_loader"],
        config,
        folder=folder,
        console=arguments["console"],
    )


def epoch_rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["images_per_second"]
    return rows


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_overfits_64_images(tmp_path: Path, amp: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    config = recipe("schedule.epochs=30", "schedule.sizes=", f"amp={amp}")
    training = trainer(tmp_path, config, console=console)
    history = training.fit()
    assert history.rows[-1].train_accuracy == 1.0
    assert history.rows[-1].train_loss < 0.1
    assert training.test(loader(training=False)).accuracy == history.best.val_accuracy == 1.0
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 30
    for field in ("epoch 30/30", "lr ", "train loss ", "val loss ", "acc 100.00%", "images/s"):
        assert field in lines[-1]


def test_best_weights_are_those_of_the_best_epoch(tmp_path: Path) -> None:
    # A learning rate at which the validation accuracy jumps up and down.
    config = recipe("schedule.epochs=8", "schedule.kind=constant", "optim.lr=0.3")
    training = trainer(tmp_path, config)
    history = training.fit()
    accuracies = [row.val_accuracy for row in history.rows]
    assert history.best.val_accuracy == max(accuracies)
    assert len(set(accuracies)) > 1

    test = training.test(loader(training=False))
    assert test.accuracy == history.best.val_accuracy
    assert test.loss == pytest.approx(history.best.val_loss)
    fresh = network()
    load_weights(training.best_weights, fresh)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, training.model.state_dict()[name])


def test_equal_accuracies_are_told_apart_by_loss() -> None:
    row = EpochRow(
        epoch=1,
        image_size=None,
        learning_rate=0.1,
        train_loss=1.0,
        train_accuracy=0.5,
        val_loss=0.5,
        val_accuracy=0.8,
        images_per_second=1.0,
        seconds=1.0,
    )
    better = dataclasses.replace(row, epoch=2, val_loss=0.4)
    worse = dataclasses.replace(row, epoch=3, val_loss=0.1, val_accuracy=0.7)
    assert History((row, better, worse)).best is better


class Interrupted(TensorLoader):
    """Stops in the middle of an epoch, as a killed process does."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch in enumerate(super().__iter__()):
            if self._epoch == 2 and step == 2:
                raise KeyboardInterrupt
            yield batch


def test_resumed_run_ends_exactly_as_an_undisturbed_one(tmp_path: Path) -> None:
    config = recipe("schedule.epochs=4")
    undisturbed = trainer(tmp_path / "undisturbed", config)
    undisturbed.fit()

    stopping = loader(training=True)
    stopping.__class__ = Interrupted
    stopped = trainer(tmp_path / "stopped", config, train_loader=stopping)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert len(epoch_rows(tmp_path / "stopped")) == 2
    # Killed between the state and the row of metrics: the state counts.
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])

    torch.manual_seed(12345)
    model = network()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    resumed = trainer(tmp_path / "stopped", config, model=model)
    resumed.resume()
    resumed.fit()
    for name, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert epoch_rows(tmp_path / "stopped") == epoch_rows(tmp_path / "undisturbed")
    assert undisturbed.best_weights.read_bytes() == resumed.best_weights.read_bytes()


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    trainer(tmp_path, recipe("schedule.epochs=1")).fit()
    with pytest.raises(CheckpointError, match="expected a run of 8 steps, got one of 4"):
        trainer(tmp_path, recipe("schedule.epochs=2")).resume()
    with pytest.raises(CheckpointError, match="expected the state of this model"):
        trainer(tmp_path, recipe("schedule.epochs=1"), model=nn.Linear(2, 2)).resume()


def test_sizes_reach_both_loaders(tmp_path: Path) -> None:
    seen = []

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, x.shape[-1], x.stride(1)))
            return self.inner(x)

    training = trainer(tmp_path, recipe("schedule.epochs=2"), model=Recording())
    history = training.fit()
    assert [row.image_size for row in history.rows] == [4, 8]
    assert seen == [
        (training, size, 1) for size in (4, 8) for training in (True, False) for _ in range(4)
    ]


def test_divergence_is_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"diverged: .* try a lower optim\.lr"):
        trainer(tmp_path, recipe("optim.lr=1e30")).fit()


def test_evaluate_counts_every_image_and_leaves_the_model_alone() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = loader(70, training=False)  # the last batch is not full
    evaluation = evaluate(
        model,
        images,
        label_smoothing=0.1,
        amp=None,
        console=Console(file=io.StringIO()),
        title="test",
    )
    pixels = torch.cat([batch for batch, _ in images])
    labels = torch.cat([batch for _, batch in images])
    with torch.no_grad():
        logits = model.eval()(pixels)
    assert evaluation.images == 70
    assert evaluation.loss == pytest.approx(
        F.cross_entropy(logits, labels, label_smoothing=0.1).item(), rel=1e-5
    )
    assert evaluation.accuracy == int((logits.argmax(1) == labels).sum()) / 70
    for true in range(CLASSES):
        for predicted in range(CLASSES):
            count = ((labels == true) & (logits.argmax(1) == predicted)).sum()
            assert evaluation.confusion[true, predicted] == count
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="at least one batch, got none"):
        evaluate(
            model,
            [],
            label_smoothing=0.0,
            amp=None,
            console=Console(file=io.StringIO()),
            title="test",
        )


def test_progress_says_steps_and_speed_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastresnet.train import progress

    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), width=200)
    with progress.EpochProgress(console, "epoch 1/2 train", 10) as bar:
        for _ in range(3):
            assert bar.advance(16)
        bar.show("loss 1.0")
        assert bar.images_per_second > 0
    line = console.file.getvalue()
    assert line.startswith("epoch 1/2 train  step 3/10  ")
    assert line.endswith("images/s  loss 1.0\n")


def test_progress_draws_a_bar_on_a_terminal() -> None:
    from fastresnet.train.progress import EpochProgress

    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with EpochProgress(console, "epoch 1/2 train", 3) as bar:
        for _ in range(3):
            bar.advance(16)
        bar.show("loss 1.0")
    drawn = console.file.getvalue()
    assert "epoch 1/2 train" in drawn
    assert "━" in drawn
    assert "3/3" in drawn


def test_running_metrics_weigh_batches_by_their_size() -> None:
    metrics = RunningMetrics(torch.device("cpu"))
    logits = torch.eye(3)
    metrics.update(torch.tensor(1.0), logits, torch.tensor([0, 1, 0]))
    metrics.update(torch.tensor(5.0), logits[:1], torch.tensor([0]))
    assert metrics.loss() == pytest.approx(2.0)
    assert metrics.accuracy() == pytest.approx(0.75)
