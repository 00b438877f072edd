# SPDX-License-Identifier: Apache-2.0
"""The loader of sets in memory, and what all loaders share: epochs, state, devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastresnet.data import Augment, ImageSet, TensorLoader, make_loader
from fastresnet.data.augment import choose, draw

COUNT, SIDE = 50, 12


def image_set(channels: int = 1, count: int = COUNT) -> ImageSet:
    """Random images, each with its index as its label, so that a batch says whose it holds."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (count, SIDE, SIDE, channels), dtype=torch.uint8, generator=generator
    )
    return ImageSet(images, torch.arange(count))


def augment(channels: int = 1, **settings) -> Augment:
    return Augment(
        **{
            "size": 16,
            "resize": SIDE,
            "crop": "random",
            "padding": 4,
            "hflip": 0.5,
            "mean": (0.4,) * channels,
            "std": (0.25,) * channels,
            **settings,
        }
    )


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
    for _ in range(3):  # an epoch gone through is followed by the next
        batches = [labels for _, labels in loader]
        assert len(batches) == len(loader)
        assert all(len(labels) == batch_size for labels in batches[:-1])
        orders.append(torch.cat(batches).tolist())
        assert sorted(orders[-1]) == list(range(COUNT))
    assert orders[0] != orders[1] != orders[2] != list(range(COUNT))
    loader.set_epoch(1)
    assert torch.cat([labels for _, labels in loader]).tolist() == orders[1]


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
    drawn = choose(spec, np.full((COUNT, 2), SIDE), draw(COUNT, seed=1, epoch=2))
    padded = F.pad(source.images.permute(0, 3, 1, 2).float() / 255, (spec.padding,) * 4)
    for index in range(COUNT):
        left, top = (int(side) + spec.padding for side in drawn.boxes[index, :2])
        expected = padded[index, :, top : top + spec.size, left : left + spec.size]
        if drawn.hflips[index]:
            expected = expected.flip(2)
        torch.testing.assert_close(images[index], (expected - 0.4) / 0.25)


def test_evaluation_takes_central_crops_in_order() -> None:
    source = image_set(3)
    loader = TensorLoader(source, augment(3), batch_size=16, training=False)
    images = torch.cat([images for images, _ in loader])
    labels = torch.cat([labels for _, labels in loader])
    assert torch.equal(labels, torch.arange(COUNT))
    expected = F.pad(source.images.permute(0, 3, 1, 2).float() / 255, (2, 2, 2, 2))
    torch.testing.assert_close(images, (expected - 0.4) / 0.25)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [16, 8, 5])
def test_images_are_channels_last_and_the_same_crops_at_another_size(
    channels: int, image_size: int
) -> None:
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
    expected = F.interpolate(full, (image_size, image_size), mode="bilinear", antialias=True)
    # A resized crop is rounded to whole grey levels, 1 / (255 * 0.25) apart, in each direction.
    torch.testing.assert_close(images, expected, atol=1.02 / (255 * 0.25), rtol=0)


def test_bfloat16_images_are_the_rounded_ones() -> None:
    spec = augment(3, rotation=20)
    exact, rounded = (
        next(iter(TensorLoader(image_set(3), spec, batch_size=8, training=True, dtype=dtype)))[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(rounded, exact.bfloat16())
    with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch\.float16"):
        TensorLoader(image_set(3), spec, batch_size=8, training=True, dtype=torch.float16)


# The first images come several times an epoch, most of the others in some epochs only.
WEIGHTS = np.where(np.arange(COUNT) < 4, 8.0, 1.0)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_shards_are_the_parts_of_one_loaders_batches(weights: np.ndarray | None) -> None:
    settings = {"training": True, "weights": weights}
    whole = TensorLoader(image_set(), augment(), batch_size=8, **settings)
    shards = [
        TensorLoader(image_set(), augment(), batch_size=4, shard=shard, num_shards=2, **settings)
        for shard in (0, 1)
    ]
    for (images, labels), *parts in zip(whole, *shards, strict=True):
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("step", [0, 3, 7])
def test_state_of_epoch_and_step_gives_the_rest_of_the_stream(
    step: int, weights: np.ndarray | None
) -> None:
    settings = {"batch_size": 8, "training": True, "seed": 9, "weights": weights}
    loader = TensorLoader(image_set(), augment(), **settings)
    loader.set_epoch(2)
    batches = list(loader)
    loader.set_epoch(2)
    going = iter(loader)
    for _ in range(step):
        next(going)
    state = loader.state_dict()
    assert state == {"epoch": 2, "step": step}

    again = TensorLoader(image_set(), augment(), **settings)
    again.load_state_dict(state)
    assert again.state_dict() == state
    rest = list(again)
    assert len(rest) == 7 - step
    for (images, labels), (wanted, wanted_labels) in zip(rest, batches[step:], strict=True):
        assert torch.equal(images, wanted)
        assert torch.equal(labels, wanted_labels)
    assert again.state_dict() == {"epoch": 3, "step": 0}
    assert len(list(again)) == 7  # the state counts once


def test_an_image_that_comes_again_in_an_epoch_is_augmented_anew() -> None:
    source = image_set()
    loader = make_loader(source, augment(), 8, training=True, weights=torch.from_numpy(WEIGHTS))
    images, labels = (torch.cat(tensors) for tensors in zip(*loader, strict=True))
    counts = torch.bincount(labels, minlength=COUNT)
    assert len(labels) == COUNT
    assert (counts[:4] - COUNT * 8 / WEIGHTS.sum()).abs().max() < 1
    assert (counts[4:] == 0).any()
    for label in range(4):
        views = images[labels == label]
        # 81 crops and two ways round, so that two of five may be the same now and then.
        assert len(views.flatten(1).unique(dim=0)) > len(views) / 2
    with pytest.raises(ValueError, match="expected no weights of images that are not shuffled"):
        make_loader(source, augment(), 8, training=False, weights=torch.from_numpy(WEIGHTS))


def test_state_of_another_set_is_refused() -> None:
    loader = TensorLoader(image_set(), augment(), batch_size=8, training=True)
    with pytest.raises(ValueError, match=r"a step in 0\.\.7, got 8"):
        loader.load_state_dict({"epoch": 0, "step": 8})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "a batch size of at least 1, got 0"),
        ({"augment": augment(3)}, r"a mean for each of 1 channels"),
        ({"augment": augment(hue=0.1)}, "colour images for a change of colour, got 1 channels"),
        ({"shard": 1}, r"a shard in 0\.\.0, got 1 of 1"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    given = {"augment": augment(), "batch_size": 4, "training": True, **settings}
    with pytest.raises(ValueError, match=f"expected {message}"):
        TensorLoader(image_set(), given.pop("augment"), **given)


@pytest.mark.parametrize("image_size", [0, 17])
def test_image_size_beyond_the_augmentations_is_named(image_size: int) -> None:
    loader = TensorLoader(image_set(), augment(), batch_size=4, training=True)
    with pytest.raises(ValueError, match=rf"an image size in 1\.\.16, got {image_size}"):
        loader.set_epoch(0, image_size=image_size)


def test_make_loader_keeps_images_in_memory() -> None:
    loader = make_loader(image_set(), augment(), 8, training=True)
    assert isinstance(loader, TensorLoader)
    assert loader.description == "in memory, cpu"
    with pytest.raises(ValueError, match="one of auto, dali, native, torchvision, got 'cv2'"):
        make_loader(image_set(), augment(), 8, training=True, backend="cv2")
