# SPDX-License-Identifier: Apache-2.0
"""Which images an epoch shows to which shard, in which batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastresnet.data.order import Order, shuffled


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
