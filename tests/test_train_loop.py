# SPDX-License-Identifier: Apache-2.0
"""The loop on a network of a few thousand parameters: learns, judges, stops, tells of trouble."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastresnet.data import Augment, ImageSet, TensorLoader
from fastresnet.train import RECIPES, Recipe, apply_overrides
from fastresnet.train.batches import build_mix
from fastresnet.train.checkpoint import CheckpointError, load_state, load_weights
from fastresnet.train.config import LossConfig, MixConfig
from fastresnet.train.evaluate import evaluate
from fastresnet.train.loop import EpochRow, History, Trainer
from fastresnet.train.objective import Objective

CLASSES = 4


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps this small are done before a second thread has woken up, or a disk has answered."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(*overrides: str) -> Recipe:
    return apply_overrides(
        RECIPES["fashion-mnist"](),
        [
            "schedule.epochs=3",
            "schedule.sizes=4,8",
            "augment.size=8",
            "augment.padding=0",
            "loss.label_smoothing=0",
            "amp=none",
            "tensorboard=false",
            "log_every=0",
            *overrides,
        ],
    )


def network(outputs: int = CLASSES) -> nn.Module:
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
        nn.Linear(128, outputs),
    )


def images(count: int = 64) -> ImageSet:
    """Random images with random labels: nothing to learn but the images themselves."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 8, 8, 1), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(0, CLASSES, (count,), generator=generator))


def loader(count: int = 64, *, training: bool, batch_size: int = 16) -> TensorLoader:
    augment = Augment(size=8, mean=(0.5,), std=(0.3,))
    return TensorLoader(images(count), augment, batch_size=batch_size, training=training)


def objective(config: Recipe, labels: Tensor | None = None) -> Objective:
    return Objective(config.loss, images().labels if labels is None else labels, classes=CLASSES)


def trainer(folder: Path, config: Recipe, **changes: object) -> Trainer:
    arguments = {
        "model": network(objective(config).outputs),
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
        objective(config),
        folder=folder,
        console=arguments["console"],
    )


def events(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.pop("event") == kind]
    for row in rows:
        for timed in ("seconds", "data_seconds", "images_per_second"):
            row.pop(timed, None)
    return rows


def judge(model: nn.Module, batches: TensorLoader, config: LossConfig, **changes: object):
    return evaluate(
        model,
        batches,
        Objective(config, images().labels, classes=CLASSES),
        amp=None,
        console=Console(file=io.StringIO()),
        title="test",
        **changes,
    )


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_overfits_64_images(tmp_path: Path, amp: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    config = recipe("schedule.epochs=30", "schedule.sizes=", f"amp={amp}")
    training = trainer(tmp_path, config, console=console)
    history = training.fit()
    assert history.rows[-1].train_accuracy == 1.0
    assert history.rows[-1].train_loss < 0.1
    test = training.test(loader(training=False)).evaluation
    assert test.accuracy == history.best.val_accuracy == 1.0
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 30
    for field in ("epoch 30/30", "lr ", "train loss ", "val loss ", "acc 100.00%", "images/s"):
        assert field in lines[-1]


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.kind=adam", "optim.lr=0.01"),
        ("optim.kind=adamw", "optim.lr=0.01"),
        ("optim.kind=adagrad", "optim.lr=0.05"),
        ("optim.accumulate=3", "optim.clip_norm=1"),
        ("ema=0.8",),
        ("loss.class_weights=balanced",),
        ("schedule.kind=cosine",),
    ],
)
def test_every_way_of_training_learns(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = recipe("schedule.epochs=25", "schedule.sizes=", *overrides)
    history = trainer(tmp_path, config).fit()
    assert history.best.val_accuracy > 0.9
    assert history.rows[-1].train_loss < 0.5 * history.rows[0].train_loss


def test_a_regression_learns_the_grade(tmp_path: Path) -> None:
    config = recipe(
        "schedule.epochs=60",
        "schedule.sizes=",
        "loss.kind=regression",
        "optim.lr=0.02",
        "evaluation.ordinal=true",
        "evaluation.select=kappa",
    )
    training = trainer(tmp_path, config)
    history = training.fit()
    assert history.best.val_kappa == max(row.val_kappa for row in history.rows) > 0.9
    test = training.test(loader(training=False))
    # The thresholds are chosen on these very images.
    assert test.evaluation.kappa >= history.best.val_kappa
    assert test.thresholds.diff().min() > 0
    grades = test.evaluation.grades
    expected = torch.bucketize(grades, test.thresholds, right=True)
    assert torch.equal(test.evaluation.predictions, expected)


def test_several_batches_make_one_step(tmp_path: Path) -> None:
    plain = recipe("schedule.epochs=2", "augment.hflip=0")
    joined = trainer(tmp_path / "joined", plain, train_loader=loader(training=True, batch_size=32))
    parts = apply_overrides(plain, ["optim.accumulate=2"])
    split = trainer(tmp_path / "split", parts)
    for training in (joined, split):
        for module in training.model:  # whose statistics would be those of other batches
            if isinstance(module, nn.BatchNorm2d):
                module.forward = lambda x: x
        training.fit()
    for name, tensor in joined.model.state_dict().items():
        torch.testing.assert_close(split.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    rows = [events(tmp_path / name, "epoch") for name in ("joined", "split")]
    assert [row["learning_rate"] for row in rows[0]] == [row["learning_rate"] for row in rows[1]]


def test_the_average_is_what_is_judged_and_kept(tmp_path: Path) -> None:
    training = trainer(tmp_path, recipe("ema=0.9", "schedule.epochs=1", "schedule.sizes="))
    torch.manual_seed(0)
    average = {name: value.clone() for name, value in training.model.state_dict().items()}
    steps, update = [], training._update

    def recorded() -> None:
        update()
        steps.append({name: value.clone() for name, value in training.model.state_dict().items()})

    training._update = recorded
    training.fit()
    average = steps[0]  # the first is copied
    for step in steps[1:]:
        for name, value in step.items():
            if value.is_floating_point():
                average[name] = 0.9 * average[name] + 0.1 * value
    fresh = network()
    load_weights(training.best_weights, fresh)
    for name, value in fresh.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, average[name])
            assert not torch.equal(value, steps[-1][name])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    config = recipe("schedule.epochs=1", "optim.clip_norm=0.01", "optim.nesterov=false")
    training = trainer(tmp_path, config)
    norms, update = [], training._update

    def recorded() -> None:
        update()
        gradients = [parameter.grad for parameter in training.model.parameters()]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    training._update = recorded
    training.fit()
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_training_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    config = recipe("schedule.epochs=9", "optim.lr=1e-12", "schedule.patience=2")
    # The running statistics move, so that the first epochs may get better all the same.
    history = trainer(tmp_path, apply_overrides(config, ["evaluation.select=accuracy"])).fit()
    assert len(history.rows) < 9
    assert len(history.rows) == history.best.epoch + 2


def test_best_weights_are_those_of_the_best_epoch(tmp_path: Path) -> None:
    # A learning rate at which the validation accuracy jumps up and down.
    config = recipe("schedule.epochs=8", "schedule.kind=constant", "optim.lr=0.3")
    training = trainer(tmp_path, config)
    history = training.fit()
    accuracies = [row.val_accuracy for row in history.rows]
    assert history.best.val_accuracy == max(accuracies)
    assert len(set(accuracies)) > 1

    test = training.test(loader(training=False)).evaluation
    assert test.accuracy == history.best.val_accuracy
    assert test.loss == pytest.approx(history.best.val_loss)
    fresh = network()
    load_weights(training.best_weights, fresh)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, training.model.state_dict()[name])


def test_the_best_epoch_is_that_of_the_figure_asked_for() -> None:
    row = EpochRow(
        epoch=1,
        image_size=None,
        learning_rate=0.1,
        train_loss=1.0,
        train_accuracy=0.5,
        val_loss=0.5,
        val_accuracy=0.8,
        val_kappa=None,
        images_per_second=1.0,
        seconds=1.0,
    )
    better = dataclasses.replace(row, epoch=2, val_loss=0.4, val_kappa=0.1)
    worse = dataclasses.replace(row, epoch=3, val_loss=0.1, val_accuracy=0.7, val_kappa=0.2)
    rows = (row, better, worse)
    assert History(rows).best is better  # equal accuracies are told apart by loss
    assert History(rows, "loss").best is worse
    assert History(rows, "kappa").best is worse
    assert History(rows[:2], "kappa").best is better


class Stopping(TensorLoader):
    """Does something in the middle of the third epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().__iter__():
            yield batch
            if self.state_dict() == {"epoch": 2, "step": 2}:
                self.stop()


def stopping(stop: object) -> TensorLoader:
    batches = loader(training=True)
    batches.__class__ = Stopping
    batches.stop = stop
    return batches


EVERYTHING = (
    "schedule.epochs=4",
    "log_every=1",
    "ema=0.9",
    "mix.mixup=0.5",
    "mix.probability=0.5",
    "optim.clip_norm=1",
)


def assert_same_run(one: Path, other: Path) -> None:
    for kind in ("step", "epoch"):
        assert events(one, kind) == events(other, kind)
    states = [load_state(folder / "last.pt") for folder in (one, other)]
    for key in ("model", "optimizer", "average", "scaler", "loader", "step"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    weights = [(folder / "best.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("amp", ["none", "fp16"])
@pytest.mark.parametrize("every_steps", ["none", "1", "3"])
def test_resumed_run_ends_exactly_as_an_undisturbed_one(
    tmp_path: Path, every_steps: str, amp: str
) -> None:
    config = recipe(*EVERYTHING, f"checkpoint.every_steps={every_steps}", f"amp={amp}")

    def model() -> nn.Module:  # dropout draws random numbers in every step
        return nn.Sequential(*network()[:-1], nn.Dropout(0.2), nn.Linear(128, CLASSES))

    trainer(tmp_path / "undisturbed", config, model=model()).fit()

    def kill() -> None:
        raise RuntimeError("killed")

    stopped = trainer(tmp_path / "stopped", config, model=model(), train_loader=stopping(kill))
    with pytest.raises(RuntimeError, match="killed"):
        stopped.fit()
    state = load_state(tmp_path / "stopped" / "last.pt")
    assert state["step"] == {"none": 8, "1": 10, "3": 9}[every_steps]

    torch.manual_seed(12345)
    other = model()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    resumed = trainer(tmp_path / "stopped", config, model=other)
    resumed.resume()
    resumed.fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "undisturbed")
    table = (tmp_path / "stopped" / "metrics.csv").read_text().splitlines()
    assert len(table) == 5
    assert table[0].startswith("epoch,image_size,learning_rate,train_loss,")


def test_an_interrupted_run_saves_the_step_that_it_is_in(tmp_path: Path) -> None:
    config = recipe(*EVERYTHING, "optim.accumulate=2")
    trainer(tmp_path / "undisturbed", config).fit()
    handler = signal.getsignal(signal.SIGINT)
    stopped = trainer(
        tmp_path / "stopped",
        config,
        train_loader=stopping(lambda: signal.raise_signal(signal.SIGINT)),
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert signal.getsignal(signal.SIGINT) is handler
    state = load_state(tmp_path / "stopped" / "last.pt")
    assert state["loader"] == {"epoch": 2, "step": 4}
    resumed = trainer(tmp_path / "stopped", config)
    resumed.resume()
    resumed.fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "undisturbed")


def test_an_interruption_in_validation_loses_nothing(tmp_path: Path) -> None:
    config = recipe(*EVERYTHING)
    trainer(tmp_path / "undisturbed", config).fit()

    class Validation(TensorLoader):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            if self.state_dict()["epoch"] == 1:
                signal.raise_signal(signal.SIGTERM)
            return super().__iter__()

    val_loader = loader(training=False)
    val_loader.__class__ = Validation
    stopped = trainer(tmp_path / "stopped", config, val_loader=val_loader)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert load_state(tmp_path / "stopped" / "last.pt")["loader"] == {"epoch": 1, "step": 4}
    resumed = trainer(tmp_path / "stopped", config)
    resumed.resume()
    resumed.fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "undisturbed")


def test_a_second_interruption_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    # Not a matter of course: a process that a shell started in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, recipe(), train_loader=stopping(twice)).fit()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_that_was_never_saved_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n')
    training = trainer(tmp_path, recipe("log_every=1", "schedule.epochs=1"))
    training.resume()
    training.fit()
    assert [row["step"] for row in events(tmp_path, "step")] == [1, 2, 3, 4]


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    trainer(tmp_path, recipe("schedule.epochs=1")).fit()
    with pytest.raises(CheckpointError, match="expected a run of 8 steps, got one of 4"):
        trainer(tmp_path, recipe("schedule.epochs=2")).resume()
    with pytest.raises(CheckpointError, match="expected the state of this model"):
        trainer(tmp_path, recipe("schedule.epochs=1"), model=nn.Linear(2, 2)).resume()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="bytes of the run to be resumed, got 0"):
        trainer(tmp_path, recipe("schedule.epochs=1")).resume()


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


@pytest.mark.parametrize("weights", ["none", (0.5, 1.0, 2.0, 0.0)])
def test_evaluate_counts_every_image_and_leaves_the_model_alone(
    weights: str | tuple[float, ...],
) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = loader(70, training=False)  # the last batch is not full
    evaluation = judge(model, batches, LossConfig(label_smoothing=0.1, class_weights=weights))
    pixels, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    with torch.no_grad():
        logits = model.eval()(pixels)
    assert evaluation.images == 70
    losses = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    if weights != "none":
        losses = losses * torch.tensor(weights)[labels]
    assert evaluation.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert evaluation.accuracy == int((logits.argmax(1) == labels).sum()) / 70
    torch.testing.assert_close(evaluation.probabilities, logits.softmax(1))
    assert torch.equal(evaluation.labels, labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one batch, got none"):
        judge(network(), [], LossConfig())


@pytest.mark.parametrize("kind", ["cross-entropy", "regression"])
def test_flips_are_averaged(kind: str) -> None:
    config = LossConfig(kind=kind)
    model = network(Objective(config, images().labels, classes=CLASSES).outputs).eval()
    batches = loader(20, training=False)
    evaluation = judge(model, batches, config, flips=True)
    pixels = torch.cat([batch for batch, _ in batches])
    with torch.no_grad():
        views = [model(pixels.flip(dims)) for dims in ((), (2,), (3,), (2, 3))]
    if kind == "regression":
        torch.testing.assert_close(evaluation.grades, torch.stack(views).mean(0)[:, 0])
    else:
        expected = torch.stack([view.softmax(1) for view in views]).mean(0)
        torch.testing.assert_close(evaluation.probabilities, expected)
    assert evaluation.loss == pytest.approx(judge(model, batches, config).loss)


@pytest.mark.parametrize("config", [MixConfig(mixup=0.4), MixConfig(mixup=0.4, cutmix=1.0)])
def test_blended_batches_are_torchvisions(tmp_path: Path, config: MixConfig) -> None:
    blend = build_mix(config, classes=CLASSES)
    pixels, labels = next(iter(loader(training=True)))
    mixed, shares = blend(pixels, labels)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert shares.shape == (16, CLASSES)
    torch.testing.assert_close(shares.sum(1), torch.ones(16))
    # Each is blended with the one before it, in one share for all.
    ones = F.one_hot(labels, CLASSES).float()
    other = ones.roll(1, 0)
    different = labels != labels.roll(1)
    share = ((shares - other) * ones)[different].sum(1)
    torch.testing.assert_close(shares, share[0] * ones + (1 - share[0]) * other)
    assert build_mix(MixConfig(), classes=CLASSES) is None
    assert build_mix(MixConfig(mixup=1.0, probability=0.0), classes=CLASSES) is None

    overrides = (f"mix.mixup={config.mixup}", f"mix.cutmix={config.cutmix}")
    history = trainer(tmp_path, recipe("schedule.epochs=2", *overrides)).fit()
    assert history.rows[1].train_loss < history.rows[0].train_loss


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
    assert "images/s  data 0%  loss 1.0  " in line
    assert line.endswith(" s left\n")


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


@pytest.mark.parametrize(
    ("rate", "said"), [(0.43, "0.4 images/s"), (9.9, "9.9 images/s"), (117.4, "117 images/s")]
)
def test_a_slow_training_has_a_speed_too(rate: float, said: str) -> None:
    from fastresnet.train import progress

    assert progress.speed(rate) == said
