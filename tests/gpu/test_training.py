# SPDX-License-Identifier: Apache-2.0
"""The training loop on a GPU, its steps recorded in a CUDA graph or not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fastresnet
from fastresnet.data import Augment, ImageSet, TensorLoader
from fastresnet.train import RECIPES, apply_overrides
from fastresnet.train.loop import History, Trainer
from fastresnet.train.objective import Objective

pytestmark = pytest.mark.needs_cuda
LABELS = torch.arange(64) % 4


def loader(*, training: bool) -> TensorLoader:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return TensorLoader(
        ImageSet(pixels, LABELS), Augment(size=32), batch_size=16, training=training
    )


def fit(folder: Path, *overrides: str) -> History:
    settings = ["schedule.epochs=4", "schedule.sizes=", "augment.size=32", "tensorboard=false"]
    # At ten times this rate, weights that differ by a millionth come to losses that differ by 6 %
    # within the 16 steps; at this one, weights that differ by a thousandth by 4 %.
    settings += ["optim.lr=2e-4", "device=cuda"]
    recipe = apply_overrides(RECIPES["fashion-mnist"](), [*settings, *overrides])
    folder.mkdir()
    torch.manual_seed(0)
    training = Trainer(
        fastresnet.models.resnet18(num_classes=4).cuda(),
        loader(training=True),
        loader(training=False),
        recipe,
        Objective(recipe.loss, LABELS, classes=4),
        folder=folder,
        console=Console(file=io.StringIO()),
    )
    return training.fit()


@pytest.mark.parametrize(
    "overrides",
    [
        ("amp=none",),
        ("amp=bf16", "optim.kind=adamw", "optim.lr=1e-4"),
        ("amp=fp16",),
        ("amp=fp16", "optim.accumulate=3", "optim.clip_norm=1"),
        ("amp=bf16", "loss.class_weights=balanced", "ema=0.9"),
    ],
    ids=str,
)
def test_a_replayed_step_is_the_step(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    plain = fit(tmp_path / "plain", *overrides)
    graphed = fit(tmp_path / "graphed", *overrides, "cuda_graph=true")
    for one, other in zip(plain.rows, graphed.rows, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=0.05)
    assert graphed.rows[-1].train_loss < graphed.rows[0].train_loss


def test_a_network_that_waits_for_the_host_is_told(tmp_path: Path) -> None:
    class Waiting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.mean())

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 32), Waiting(), torch.nn.Flatten(), torch.nn.Linear(4, 4)
    ).cuda()
    recipe = apply_overrides(
        RECIPES["fashion-mnist"](),
        ["schedule.epochs=1", "schedule.sizes=", "augment.size=32", "cuda_graph=true"],
    )
    training = Trainer(
        model,
        loader(training=True),
        loader(training=False),
        recipe,
        Objective(recipe.loss, LABELS, classes=4),
        folder=tmp_path,
        console=Console(file=io.StringIO()),
    )
    with pytest.raises(ValueError, match="cuda_graph: expected a step that can be recorded"):
        training.fit()
