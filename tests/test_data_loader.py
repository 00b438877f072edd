# SPDX-License-Identifier: Apache-2.0
"""The in-memory loader: order, augmentation, layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastresnet.data import Augment, ImageSet, TensorLoader
from fastresnet.data.augment import draw, shuffled

COUNT, SIDE = 50, 12


def image_set(channels: int = 1, count: int = COUNT) -> ImageSet:
    """Random images, each with its index as its label, so that a batch says whose it holds."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (count, SIDE, SIDE, channels), dtype=torch.uint8, generator=generator
    )
    return ImageSet(images, torch.arange(count))


def augment(channels: int = 1) -> Augment:
    return Augment(size=16, padding=4, mean=(0.4,) * channels, std=(0.25,) * channels)


def by_label(loader: TensorLoader, epoch: int) -> dict[int, Tensor]:
    loader.set_epoch(epoch)
    return {
        int(label): image
        for images, labels in loader
        for image, label in zip(images, labels, strict=True)
    }


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_every_image_comes_once_an_epoch_in_a_new_order(batch_size: int) -> None:
    loader = TensorLoader(image_set(), augment(), batch_size=batch_size, training=True)
    orders = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = [labels for _, labels in loader]
        assert len(batches) == len(loader)
        assert all(len(labels) == batch_size for labels in batches[:-1])
        orders.append(torch.cat(batches).tolist())
        assert sorted(orders[-1]) == list(range(COUNT))
    assert orders[0] != orders[1] != orders[2] != list(range(COUNT))


def test_drop_last_leaves_out_only_what_does_not_fill_a_batch() -> None:
    loader = TensorLoader(image_set(), augment(), batch_size=16, training=True, drop_last=True)
    labels = torch.cat([labels for _, labels in loader])
    assert len(loader) == 3
    assert loader.images_per_epoch == len(labels) == len(set(labels.tolist())) == 48
    with pytest.raises(ValueError, match="at least one full batch of 64 images, got 50"):
        TensorLoader(image_set(), augment(), batch_size=64, training=True, drop_last=True)


def test_stream_depends_on_seed_and_epoch_alone() -> None:
    first = TensorLoader(image_set(), augment(), batch_size=7, training=True, seed=3)
    second = TensorLoader(image_set(), augment(), batch_size=16, training=True, seed=3)
    other = TensorLoader(image_set(), augment(), batch_size=7, training=True, seed=4)
    by_label(second, 0)  # what came before must not matter
    images = by_label(first, 5)
    for label, image in by_label(second, 5).items():
        assert torch.equal(image, images[label])
    assert any(not torch.equal(image, images[i]) for i, image in by_label(other, 5).items())
    assert any(not torch.equal(image, images[i]) for i, image in by_label(first, 6).items())


@pytest.mark.parametrize("channels", [1, 3])
def test_training_images_are_the_drawn_crops(channels: int) -> None:
    source, spec = image_set(channels), augment(channels)
    loader = TensorLoader(source, spec, batch_size=8, training=True, seed=1)
    images = by_label(loader, 2)
    corners = SIDE + 2 * spec.padding - spec.size + 1
    choices = draw(spec, COUNT, corners=(corners, corners), seed=1, epoch=2)
    padded = F.pad(source.images.permute(0, 3, 1, 2).float() / 255, (spec.padding,) * 4)
    for index in range(COUNT):
        top, left = int(choices.top[index]), int(choices.left[index])
        expected = padded[index, :, top : top + spec.size, left : left + spec.size]
        if choices.flip[index]:
            expected = expected.flip(2)
        torch.testing.assert_close(images[index], (expected - 0.4) / 0.25)


def test_drawn_choices_cover_their_range_evenly() -> None:
    choices = draw(Augment(flip=0.25), 60_000, corners=(5, 3), seed=0, epoch=0)
    # Four standard deviations of a count of 60,000 p (1 - p).
    assert torch.bincount(choices.top).sub(12_000).abs().max() < 4 * 98
    assert torch.bincount(choices.left).sub(20_000).abs().max() < 4 * 116
    assert abs(int(choices.flip.sum()) - 15_000) < 4 * 107
    together = torch.bincount(choices.top * 6 + choices.left * 2 + choices.flip)
    expected = torch.tensor([60_000 / 15 * 0.75, 60_000 / 15 * 0.25]).repeat(15)
    assert ((together - expected).abs() < 5 * expected.sqrt()).all()


def test_flip_of_zero_and_one_are_never_and_always() -> None:
    assert not draw(Augment(flip=0.0), 1000, corners=(1, 1), seed=0, epoch=0).flip.any()
    assert draw(Augment(flip=1.0), 1000, corners=(1, 1), seed=0, epoch=0).flip.all()


def test_order_is_a_permutation_unlike_its_neighbours() -> None:
    orders = [shuffled(1000, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_evaluation_takes_central_crops_in_order() -> None:
    source = image_set(3)
    loader = TensorLoader(source, augment(3), batch_size=16, training=False)
    images = torch.cat([images for images, _ in loader])
    labels = torch.cat([labels for _, labels in loader])
    assert torch.equal(labels, torch.arange(COUNT))
    expected = F.pad(source.images.permute(0, 3, 1, 2).float() / 255, (2, 2, 2, 2))
    torch.testing.assert_close(images, (expected - 0.4) / 0.25)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [16, 8, 4])
def test_images_are_channels_last_and_reduced_by_averaging(channels: int, image_size: int) -> None:
    loader = TensorLoader(image_set(channels), augment(channels), batch_size=8, training=True)
    (full, _) = next(iter(loader))
    loader.set_epoch(0, image_size=image_size)
    (images, _) = next(iter(loader))
    assert images.dtype == torch.float32
    assert images.shape == (8, channels, image_size, image_size)
    # Strides, not is_contiguous: for one channel torch calls any strides channels_last.
    assert images.stride() == (
        image_size * image_size * channels,
        1,
        image_size * channels,
        channels,
    )
    torch.testing.assert_close(images, F.avg_pool2d(full, 16 // image_size))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        TensorLoader(image_set(), augment(), batch_size=0, training=True)
    with pytest.raises(ValueError, match="a mean for each of 3 channels, got 2 means"):
        TensorLoader(
            image_set(3), Augment(mean=(0.1, 0.2), std=(1.0, 1.0)), batch_size=8, training=True
        )
    with pytest.raises(ValueError, match="at least 32 pixels a side with 4 of padding, got 12x12"):
        TensorLoader(image_set(), Augment(size=32, padding=4), batch_size=8, training=True)
    loader = TensorLoader(image_set(), augment(), batch_size=8, training=True)
    with pytest.raises(ValueError, match="image size that divides 16, got 12"):
        loader.set_epoch(0, image_size=12)
    with pytest.raises(ValueError, match="seed and epoch of at least 0, got 0 and -1"):
        shuffled(3, seed=0, epoch=-1)
    for wrong in ({"size": 0}, {"padding": -1}, {"flip": 1.5}, {"std": (0.0,)}, {"mean": ()}):
        with pytest.raises(ValueError, match="expected"):
            Augment(**wrong)
