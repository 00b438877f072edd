# SPDX-License-Identifier: Apache-2.0
"""Figures of a pass against scikit-learn's, the loss's meaning, and thresholds of a regression."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastresnet.train import ConfigError
from fastresnet.train.config import LossConfig
from fastresnet.train.evaluate import regraded, tune_thresholds
from fastresnet.train.metrics import Evaluation, RunningMetrics
from fastresnet.train.objective import Objective
from fastresnet.train.predictions import write_predictions

CLASSES = 5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are done before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluation(count: int = 300, *, grades: bool = False) -> Evaluation:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.randn(count, CLASSES, generator=generator)
    probabilities = (noise + F.one_hot(labels, CLASSES)).softmax(1)
    scores = labels + 0.7 * noise[:, 0]
    return Evaluation(0.5, probabilities, labels, scores if grades else None)


@pytest.mark.parametrize("grades", [False, True])
def test_figures_are_scikit_learns(grades: bool) -> None:
    found = evaluation(grades=grades)
    labels, predictions = found.labels.numpy(), found.probabilities.argmax(1).numpy()
    scores = found.grades if grades else found.probabilities[:, 2:].sum(1)
    peer = sklearn.metrics
    figures = found.figures(ordinal=True, referable=2)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["images"] == 300
    assert figures["accuracy"] == pytest.approx(peer.accuracy_score(labels, predictions))
    assert figures["majority"] == pytest.approx(np.bincount(labels).max() / 300)
    assert figures["recall"] == pytest.approx(
        peer.recall_score(labels, predictions, average=None).tolist()
    )
    assert figures["kappa"] == pytest.approx(
        peer.cohen_kappa_score(labels, predictions, weights="quadratic"), abs=1e-5
    )
    assert figures["auc"] == pytest.approx(peer.roc_auc_score(labels >= 2, scores), abs=1e-6)
    np.testing.assert_array_equal(found.confusion, peer.confusion_matrix(labels, predictions))
    assert set(found.figures(ordinal=False, referable=2)) == set(figures) - {"kappa", "auc"}


def test_figures_that_are_not_defined_are_none() -> None:
    certain = F.one_hot(torch.tensor([1, 1, 1]), 3).float()
    found = Evaluation(0.1, certain, torch.tensor([1, 1, 1]))
    figures = found.figures(ordinal=True, referable=2)
    assert figures["auc"] is None
    assert figures["recall"] == [None, 1.0, None]
    assert figures["majority"] == figures["accuracy"] == 1.0
    assert figures["kappa"] is None


def test_loss_is_torchs() -> None:
    logits, labels = torch.randn(6, CLASSES), torch.tensor([0, 1, 2, 3, 4, 4])
    plain = Objective(LossConfig(label_smoothing=0.1), labels, classes=CLASSES)
    peer = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert plain.loss(logits, labels) == peer
    assert plain.loss(logits.bfloat16(), labels).dtype == torch.float32
    shares = torch.rand(6, CLASSES).softmax(1)
    assert plain.loss(logits, shares) == F.cross_entropy(logits, shares, label_smoothing=0.1)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=40))
def test_balanced_weights_weigh_every_class_alike(labels: list[int]) -> None:
    labels = torch.tensor([*labels, 0, 1, 2, 3])
    objective = Objective(LossConfig(class_weights="balanced"), labels, classes=4)
    logits = torch.randn(len(labels), 4)
    # Over all of the training images: the mean over classes of the mean over their images.
    losses = F.cross_entropy(logits, labels, reduction="none")
    expected = torch.stack([losses[labels == label].mean() for label in range(4)]).mean()
    torch.testing.assert_close(objective.loss(logits, labels), expected)
    hard = F.one_hot(labels, 4).float()
    torch.testing.assert_close(objective.loss(logits, hard), expected)
    # Halves of a batch have the mean of their losses.
    half = len(labels) // 2
    parts = [objective.loss(logits[s], labels[s]) for s in (slice(half), slice(half, 2 * half))]
    whole = objective.loss(logits[: 2 * half], labels[: 2 * half])
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_bad_weights_are_named() -> None:
    labels = torch.tensor([0, 1, 1])
    with pytest.raises(ConfigError, match="of every class to balance, got none of class 2"):
        Objective(LossConfig(class_weights="balanced"), labels, classes=3)
    with pytest.raises(ConfigError, match="expected 3 weights, one for each class, got 2"):
        Objective(LossConfig(class_weights=(1.0, 2.0)), labels, classes=3)


def test_a_regression_is_of_the_grade() -> None:
    objective = Objective(LossConfig(kind="regression"), torch.arange(5), classes=CLASSES)
    assert objective.outputs == 1
    outputs, labels = torch.randn(7, 1), torch.randint(0, 5, (7,))
    peer = F.mse_loss(outputs[:, 0], labels.float())
    assert objective.loss(outputs, labels) == peer
    shares = F.one_hot(labels, CLASSES).float()
    torch.testing.assert_close(objective.loss(outputs, shares), peer)


@given(
    st.lists(st.floats(-2, 7, width=32), min_size=1, max_size=30),
    st.lists(st.floats(0, 4, width=32), min_size=4, max_size=4, unique=True),
)
def test_probabilities_of_a_grade_follow_the_thresholds(
    grades: list[float], places: list[float]
) -> None:
    objective = Objective(LossConfig(kind="regression"), torch.arange(5), classes=CLASSES)
    values, thresholds = torch.tensor(grades), torch.tensor(sorted(places))
    for found, borders in (
        (objective.probabilities(values[:, None]), torch.arange(4) + 0.5),
        (objective.probabilities(values[:, None], thresholds), thresholds),
    ):
        torch.testing.assert_close(found.sum(1), torch.ones(len(values)))
        assert found.min() >= 0
        expected = torch.bucketize(values, borders, right=True)
        # On a border, or where two are one to float32, either class is right.
        clear = (values[:, None] - borders).abs().amin(1) > 1e-3
        clear &= (borders.diff().min() > 1e-3) | (borders is not thresholds)
        assert torch.equal(found.argmax(1)[clear], expected[clear])


def test_thresholds_are_tuned_for_kappa() -> None:
    found = evaluation(grades=True)
    squeezed = Evaluation(0.0, found.probabilities, found.labels, 0.5 * found.grades + 0.2)
    objective = Objective(LossConfig(kind="regression"), found.labels, classes=CLASSES)
    before = regraded(squeezed, objective, None)
    thresholds = tune_thresholds(squeezed.grades, squeezed.labels, classes=CLASSES)
    after = regraded(squeezed, objective, thresholds)
    # As good as those that undo the squeezing.
    undone = regraded(squeezed, objective, 0.5 * (torch.arange(4) + 0.5) + 0.2)
    assert thresholds.diff().min() > 0
    assert before.kappa < undone.kappa
    assert after.kappa > undone.kappa - 0.01
    assert after.grades is squeezed.grades


def test_running_metrics_weigh_batches_by_their_size() -> None:
    metrics = RunningMetrics(torch.device("cpu"))
    metrics.update(torch.tensor(1.0), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0]))
    metrics.update(torch.tensor(5.0), torch.tensor([0]), torch.tensor([0]))
    copy = RunningMetrics(torch.device("cpu"))
    copy.load_state_dict(metrics.state_dict())
    for each in (metrics, copy):
        assert each.loss() == pytest.approx(2.0)
        assert each.accuracy() == pytest.approx(0.75)
        assert each.images == 4


def test_predictions_come_back(tmp_path: Path) -> None:
    for grades in (False, True):
        found = evaluation(grades=grades)
        write_predictions(tmp_path / "predictions.npz", found, torch.arange(300) + 7)
        with np.load(tmp_path / "predictions.npz", allow_pickle=False) as arrays:
            names = {"probabilities", "labels", "index"} | ({"grades"} if grades else set())
            assert set(arrays) == names
            assert arrays["probabilities"].dtype == np.float32
            np.testing.assert_array_equal(arrays["probabilities"], found.probabilities)
            np.testing.assert_array_equal(arrays["labels"], found.labels)
            assert arrays["index"].tolist() == list(range(7, 307))
