# SPDX-License-Identifier: Apache-2.0
"""Which images an epoch shows to which shard, in which batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastresnet.data.order import Order, balancing_weights, shuffled


def test_shuffled_is_a_permutation_unlike_its_neighbours() -> None:
    orders = [shuffled(1000, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    for first, second in itertools.combinations(orders, 2):
        assert (first == second).sum() < 20


@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 12),
    num_shards=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_every_image_comes_once_over_all_shards(
    count: int, batch_size: int, num_shards: int, shuffle: bool
) -> None:
    for epoch in range(3):
        seen = []
        for shard in range(num_shards):
            order = Order(count, batch_size, shuffle=shuffle, shard=shard, num_shards=num_shards)
            batches = list(order.batches(epoch))
            assert len(batches) == len(order)
            assert sum(len(batch) for batch in batches) == order.images
            assert all(1 <= len(batch) <= batch_size for batch in batches)
            assert all(len(batch) == batch_size for batch in batches[:-1])
            seen.extend(np.concatenate(batches).tolist() if batches else [])
        assert sorted(seen) == list(range(count))


@given(count=st.integers(12, 60), batch_size=st.integers(1, 4), num_shards=st.integers(1, 3))
def test_shards_together_see_the_batches_of_one_loader(
    count: int, batch_size: int, num_shards: int
) -> None:
    whole = Order(count, batch_size * num_shards, shuffle=True, seed=5, drop_last=True)
    shards = [
        Order(
            count,
            batch_size,
            shuffle=True,
            seed=5,
            drop_last=True,
            shard=shard,
            num_shards=num_shards,
        )
        for shard in range(num_shards)
    ]
    assert {len(shard) for shard in shards} == {len(whole)}
    together = zip(*(shard.batches(3) for shard in shards), strict=True)
    for batch, parts in zip(whole.batches(3), together, strict=True):
        assert np.array_equal(batch, np.concatenate(parts))


def test_an_epoch_goes_on_where_it_was_left() -> None:
    order = Order(50, 7, shuffle=True, seed=2)
    batches = list(order.batches(4))
    for begin in range(len(order) + 1):
        rest = list(order.batches(4, begin=begin))
        assert len(rest) == len(order) - begin
        assert all(np.array_equal(*pair) for pair in zip(rest, batches[begin:], strict=True))


def test_followers_go_round_the_epochs_order() -> None:
    order = Order(5, 2, shuffle=True, seed=1)
    sequence = np.concatenate(list(order.batches(0))).tolist()
    assert list(order.followers(0, sequence[3], count=3)) == [
        sequence[4],
        sequence[0],
        sequence[1],
    ]
    assert len(list(order.followers(0, 0, count=99))) == 4


@given(
    weights=st.lists(st.integers(0, 20), min_size=1, max_size=40).filter(any),
    seed=st.integers(0, 50),
)
def test_weights_say_how_often_an_image_comes(weights: list[int], seed: int) -> None:
    count = len(weights)
    order = Order(count, 3, shuffle=True, seed=seed, weights=np.array(weights, dtype=float))
    expected = count * np.array(weights) / sum(weights)
    totals = np.zeros(count)
    for epoch in range(3):
        places = np.concatenate(list(order.batches(epoch)))
        assert sorted(places.tolist()) == list(range(count))
        found = np.bincount(order.members(epoch)[places], minlength=count)
        assert (np.abs(found - expected) < 1 + 1e-9).all()  # rounded up or down
        totals += found
    assert (totals[expected == 0] == 0).all()


def test_weights_draw_rare_images_as_often_as_they_should() -> None:
    weights = np.array([0.05, 0.1, 0.15, 0.3, 0.4, 4, 1, 2])
    order = Order(8, 2, shuffle=True, weights=weights)
    totals = sum(np.bincount(order.members(epoch), minlength=8) for epoch in range(2000))
    # Systematic sampling: the deviation of a mean of 2,000 is below sqrt(1/4/2000) = 0.011.
    assert np.abs(totals / 2000 - 8 * weights / weights.sum()).max() < 0.05


def test_equal_weights_show_each_image_once() -> None:
    order = Order(1000, 7, shuffle=True, weights=np.full(1000, 0.1))
    for epoch in range(20):
        assert sorted(order.members(epoch).tolist()) == list(range(1000))


def test_balanced_classes_come_equally_often_in_every_epoch() -> None:
    labels = torch.tensor([0] * 700 + [2] * 250 + [3] * 50)  # none of class 1
    order = Order(1000, 10, shuffle=True, seed=3, weights=balancing_weights(labels))
    first, second = (order.members(epoch) for epoch in (0, 1))
    for members in (first, second):
        counts = np.bincount(labels.numpy()[members], minlength=4)
        assert counts[1] == 0
        assert np.abs(counts[[0, 2, 3]] - 1000 / 3).max() <= 35  # each image: at most one off
    assert set(first) != set(second)
    # The places' order is random too: a batch does not hold the neighbours of the draw.
    batch = next(order.batches(0))
    assert len(set(np.diff(np.sort(batch)))) > 1


def test_followers_show_other_images() -> None:
    order = Order(6, 2, shuffle=True, weights=np.array([8.0, 1, 1, 1, 1, 0]))
    members = order.members(0)
    place = int(np.flatnonzero(members == 0)[0])
    followers = list(order.followers(0, place, count=2))
    assert len(followers) == len({0, *members[followers]}) - 1 == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "at least one image, got 0"),
        ({"batch_size": 0}, "a batch size of at least 1, got 0"),
        ({"shard": 2, "num_shards": 2}, "a shard in 0..1, got 2 of 2"),
        (
            {"drop_last": True, "num_shards": 2, "batch_size": 6},
            "at least one full batch of 12 images, got 10 images and drop_last",
        ),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"expected {message}"):
        Order(**{"count": 10, "batch_size": 2, "shuffle": True, **settings})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], r"a weight for each of 3 images, got \[2\]"),
        ([1, -1, 1], r"finite weights of at least 0, not all of them 0, got -1\.\.1"),
        ([0, 0, 0], r"finite weights of at least 0, not all of them 0, got 0\.\.0"),
        ([1, np.nan, 1], "finite weights"),
    ],
)
def test_bad_weights_are_named(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"expected {message}"):
        Order(3, 1, shuffle=True, weights=np.array(weights, dtype=float))
    with pytest.raises(ValueError, match="expected no weights of images that are not shuffled"):
        Order(3, 1, shuffle=False, weights=np.ones(3))
