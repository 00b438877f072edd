# SPDX-License-Identifier: Apache-2.0
"""The typed configuration of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from fastresnet.data.augment import Augment


class ConfigError(ValueError):
    """A setting does not exist, or its value has the wrong type or range."""


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are dealt out; what is done to each of them is an
    :class:`fastresnet.data.Augment`."""

    dataset: str  # the name of a published set, or a folder
    layout: str | None = None  # how the folder is laid out; none: as it is recognised
    batch_size: int = 128  # images of a step, in each process
    # The share of the training images that is held out to choose the best epoch; none: the set's
    # own validation part.
    validation: float | None = 1 / 12
    # Show each class as often as another in training, rare ones' images several times an epoch and
    # common ones' not in all; no: each image once.
    balanced: bool = False
    backend: Literal["auto", "dali", "native", "torchvision"] = "auto"  # what decodes files
    workers: int | None = None  # its threads; none: as many as there are processors
    on_error: Literal["raise", "skip", "placeholder"] = "raise"  # at files that cannot be used
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the images

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, "data.batch_size", "at least 1", self.batch_size)
        _require(
            self.validation is None or 0 < self.validation < 1,
            "data.validation",
            "a share in 0..1, or none",
            self.validation,
        )
        _require(
            self.workers is None or self.workers > 0, "data.workers", "at least 1", self.workers
        )


@dataclass(frozen=True)
class ModelConfig:
    """Which network: the name of a factory in ``fastresnet.models``, and where it starts from."""

    name: str
    # torchvision's name, as in ResNet18_Weights.IMAGENET1K_V1, or a file of weights.
    pretrained: str | None = None
    # "lab3": a ResNet's last layer on means over 7 x 7 places rather than on the mean of all.
    head: Literal["standard", "lab3"] = "standard"


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, as torch's class of that name computes it."""

    kind: Literal["sgd", "adam", "adamw", "adagrad"] = "sgd"
    lr: float = 0.1  # the highest learning rate of the schedule
    momentum: float = 0.9  # of sgd
    nesterov: bool = True  # of sgd
    betas: tuple[float, ...] = (0.9, 0.999)  # of adam and adamw
    weight_decay: float = 5e-4
    decay_all: bool = False  # also biases and normalisation
    clip_norm: float | None = None  # the longest that the gradient of all parameters may be
    accumulate: int = 1  # batches whose gradients make one step

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", "more than 0", self.lr)
        _require(0 <= self.momentum < 1, "optim.momentum", "a value in 0..1", self.momentum)
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            "two values in 0..1",
            self.betas,
        )
        _require(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)
        _require(
            not (self.nesterov and self.momentum == 0),
            "optim.nesterov",
            "false where optim.momentum is 0",
            self.nesterov,
        )
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            "optim.clip_norm",
            "more than 0, or none",
            self.clip_norm,
        )
        _require(self.accumulate > 0, "optim.accumulate", "at least 1", self.accumulate)


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, at which image sizes, and how the learning rate moves by the step.

    The learning rate rises in a line from ``start`` to the highest over the warm-up, and then:
    falls in a line to ``final`` ("one-cycle"; Smith 2018) or along half a cosine ("cosine";
    Loshchilov & Hutter 2016), is multiplied by ``gamma`` at each of the ``milestones`` ("step",
    torch's MultiStepLR) or after each epoch ("exponential", torch's ExponentialLR), or stays
    ("constant"). "cyclical" rises from ``start`` and falls to it again ``cycles`` times (Smith
    2015), without a warm-up.
    """

    epochs: int
    kind: Literal["one-cycle", "cosine", "step", "exponential", "cyclical", "constant"] = (
        "one-cycle"
    )
    warmup: float = 0.25  # share of the steps in which the learning rate rises
    start: float = 0.04  # first learning rate, as a share of optim.lr
    final: float = 0.0  # learning rate approached at the end, as a share of optim.lr
    gamma: float = 0.1  # what a step of "step" or an epoch of "exponential" multiplies by
    milestones: tuple[int, ...] = ()  # finished epochs behind which "step" goes down
    cycles: int = 4  # of "cyclical"
    sizes: tuple[int, ...] = ()  # image sizes, spread evenly over the epochs; empty: the full size
    # Epochs without a better one after which training ends; none: it never does.
    patience: int | None = None

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "schedule.epochs", "at least 1", self.epochs)
        _require(0 <= self.warmup < 1, "schedule.warmup", "a share in 0..1", self.warmup)
        _require(0 <= self.start <= 1, "schedule.start", "a share in 0..1", self.start)
        _require(0 <= self.final <= 1, "schedule.final", "a share in 0..1", self.final)
        _require(0 < self.gamma <= 1, "schedule.gamma", "a factor in 0..1", self.gamma)
        _require(
            list(self.milestones) == sorted({epoch for epoch in self.milestones if epoch > 0}),
            "schedule.milestones",
            "ascending epochs of at least 1",
            self.milestones,
        )
        _require(
            self.kind != "step" or bool(self.milestones),
            "schedule.milestones",
            'epochs where schedule.kind is "step"',
            self.milestones,
        )
        _require(self.cycles > 0, "schedule.cycles", "at least 1", self.cycles)
        _require(all(size > 0 for size in self.sizes), "schedule.sizes", "sizes > 0", self.sizes)
        _require(
            self.patience is None or self.patience > 0,
            "schedule.patience",
            "at least 1, or none",
            self.patience,
        )

    def image_size(self, epoch: int) -> int | None:
        """The image size of an epoch (counted from 0), or None for the full size."""
        sizes = self.sizes[-self.epochs :]  # the last ones, where there are fewer epochs than sizes
        return sizes[epoch * len(sizes) // self.epochs] if sizes else None


@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    "cross-entropy" of the classes, or "regression": the squared difference of one output from the
    label, where labels are grades.
    """

    kind: Literal["cross-entropy", "regression"] = "cross-entropy"
    label_smoothing: float = 0.0
    # What an image of each class weighs. "balanced": as the inverse of its class's frequency in
    # the training images, on average 1.
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"

    def __post_init__(self) -> None:
        _require(
            0 <= self.label_smoothing < 1,
            "loss.label_smoothing",
            "a share in 0..1",
            self.label_smoothing,
        )
        _require(
            self.kind == "cross-entropy" or self.label_smoothing == 0,
            "loss.label_smoothing",
            "0 in a regression",
            self.label_smoothing,
        )
        weights = self.class_weights
        _require(
            isinstance(weights, str) or (len(weights) > 0 and min(weights) >= 0),
            "loss.class_weights",
            "none, balanced, or a weight of at least 0 for each class",
            weights,
        )


@dataclass(frozen=True)
class MixConfig:
    """Training batches blended with themselves, as torchvision's v2.MixUp (Zhang et al. 2017) and
    v2.CutMix (Yun et al. 2019) do; with both, one of the two is drawn each time."""

    mixup: float = 0.0  # alpha of the Beta distribution; 0: none
    cutmix: float = 0.0
    probability: float = 1.0  # that a batch is blended at all

    def __post_init__(self) -> None:
        _require(self.mixup >= 0, "mix.mixup", "at least 0", self.mixup)
        _require(self.cutmix >= 0, "mix.cutmix", "at least 0", self.cutmix)
        _require(0 <= self.probability <= 1, "mix.probability", "a share in 0..1", self.probability)


@dataclass(frozen=True)
class EvaluationConfig:
    """How networks are judged."""

    # The validation figure that chooses the best epoch.
    select: Literal["accuracy", "kappa", "loss"] = "accuracy"
    # Labels are grades: quadratic weighted kappa and the AUC of "referable" are reported.
    ordinal: bool = False
    referable: int = 2  # the lowest grade to be referred
    flips: bool = False  # test on the mean over the image and its flips, both ways and each
    # Where a regression's grades part, chosen for the validation images' kappa.
    tune_thresholds: bool = True
    # A regression's grade of an eye and of the patient's other one are added up, by weights that
    # fit the validation images best.
    two_eyes: bool = False

    def __post_init__(self) -> None:
        _require(self.referable > 0, "evaluation.referable", "at least 1", self.referable)
        _require(
            self.select != "kappa" or self.ordinal,
            "evaluation.ordinal",
            "true where evaluation.select is kappa",
            self.ordinal,
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved besides after each epoch, and on Ctrl-C."""

    every_steps: int | None = None
    every_seconds: float | None = 600.0

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_seconds"):
            value = getattr(self, name)
            _require(
                value is None or value > 0, f"checkpoint.{name}", "more than 0, or none", value
            )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result, and what it writes."""

    name: str
    data: DataConfig
    augment: Augment
    model: ModelConfig
    schedule: ScheduleConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # Keep an average of the weights that forgets as this factor a step does, and judge that one;
    # none: judge the weights themselves.
    ema: float | None = None
    amp: Literal["auto", "bf16", "fp16", "none"] = "auto"  # auto: bf16 where the device has it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Record forward and backward in a CUDA graph and replay that: for steps so short that the GPU
    # waits for their launches. One process, one size of image.
    cuda_graph: bool = False
    seed: int = 0
    deterministic: bool = False  # refuse torch's operators that may differ from run to run
    sync_batch_norm: bool = True  # of several processes
    log_every: int = 50  # steps between two rows of a step's loss in metrics.jsonl; 0: none
    tensorboard: bool = True
    timed_steps: int = 5  # steps of each network in the comparison at the end; 0: no comparison

    def __post_init__(self) -> None:
        _require(self.ema is None or 0 < self.ema < 1, "ema", "a factor in 0..1, or none", self.ema)
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        _require(self.log_every >= 0, "log_every", "at least 0", self.log_every)
        _require(self.timed_steps >= 0, "timed_steps", "at least 0", self.timed_steps)
        if self.cuda_graph:
            self._check_graph()
        full = min(self.augment.height, self.augment.width)
        for size in self.schedule.sizes:
            _require(size <= full, "schedule.sizes", f"sizes of at most augment.size={full}", size)
        _require(
            self.loss.kind != "regression" or self.evaluation.ordinal,
            "evaluation.ordinal",
            "true where loss.kind is regression",
            self.evaluation.ordinal,
        )

    def _check_graph(self) -> None:
        # A graph is one sequence of launches on tensors of one size.
        _require(self.device != "cpu", "cuda_graph", "false on the CPU", self.cuda_graph)
        _require(
            len(set(self.schedule.sizes)) <= 1,
            "schedule.sizes",
            "one size where cuda_graph is true",
            self.schedule.sizes,
        )
        _require(
            not (self.mix.mixup or self.mix.cutmix) or self.mix.probability in (0, 1),
            "mix.probability",
            "0 or 1 where cuda_graph is true",
            self.mix.probability,
        )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved configuration as plain values, for JSON."""
    return dataclasses.asdict(recipe)
