# SPDX-License-Identifier: Apache-2.0
"""CIFAR's files: both published forms, archives, damage, and pickles that would do harm."""

from __future__ import annotations

import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from fastresnet.data import (
    DatasetError,
    DatasetNotFoundError,
    ImageDataset,
    ImageSet,
    load_cifar10,
    load_cifar100,
    write_cifar10,
)
from fastresnet.data.datasets import cifar
from fastresnet.data.datasets.cifar_pickle import dump_batch, load_batch

CLASSES = tuple(f"class {number}" for number in range(10))
FORMS = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"}


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def no_network(name: str, root: Path) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(cifar, "torchvision_download", no_network)


def small_dataset(size: int = 32, channels: int = 3) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> ImageSet:
        images = torch.randint(0, 256, (count, size, size, channels), generator=generator)
        return ImageSet(images.to(torch.uint8), torch.arange(count) % 10)

    return ImageDataset("small", part(23), part(10), CLASSES, "here")


def assert_same(got: ImageDataset, wanted: ImageDataset) -> None:
    for ours, theirs in zip(got.parts.values(), wanted.parts.values(), strict=True):
        assert ours.images.equal(theirs.images)
        assert ours.images.is_contiguous()
        assert ours.labels.equal(theirs.labels)
    assert got.classes == wanted.classes


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_from_a_folder_or_an_archive(tmp_path: Path, form: str) -> None:
    dataset = small_dataset()
    folder = write_cifar10(dataset, tmp_path / "data", form=form)
    assert folder == tmp_path / "data" / FORMS[form]
    for root in (tmp_path / "data", folder):
        read = load_cifar10(root)
        assert (read.name, read.source) == ("cifar10", str(folder))
        assert_same(read, dataset)
    archive = tmp_path / {"python": "cifar-10-python", "binary": "cifar-10-binary"}[form]
    archive = archive.with_name(f"{archive.name}.tar.gz")
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    for root in (tmp_path, archive):
        assert_same(load_cifar10(root), dataset)
    shutil.copytree(folder, tmp_path / "cache" / "fastresnet" / folder.name)
    assert_same(load_cifar10(), dataset)


def test_torchvision_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its checksums are those of the real files.
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    dataset = small_dataset()
    write_cifar10(dataset, tmp_path)
    for train, part in ((True, dataset.train), (False, dataset.test)):
        theirs = CIFAR10(str(tmp_path), train=train)
        assert np.array_equal(theirs.data, part.images.numpy())
        assert theirs.targets == part.labels.tolist()
        assert tuple(theirs.classes) == CLASSES


def test_pickles_are_those_of_python_2(tmp_path: Path) -> None:
    folder = write_cifar10(small_dataset(), tmp_path)
    content = (folder / "data_batch_1").read_bytes()
    as_bytes, as_text = (pickle.loads(content, encoding=code) for code in ("bytes", "latin1"))
    assert set(as_bytes) == {b"batch_label", b"labels", b"data", b"filenames"}
    assert as_text["batch_label"] == "training batch 1 of 5"
    assert as_text["data"].shape == (5, 3072)
    assert as_text["data"].flags.writeable
    assert np.array_equal(as_text["data"], as_bytes[b"data"])


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_pickled_by_numpy_are_read(protocol: int, order: str) -> None:
    values = np.asarray(np.arange(6, dtype=np.uint8).reshape(2, 3), order=order)
    content = pickle.dumps({"data": values, "labels": [1, 2]}, protocol=protocol)
    batch = load_batch(content, Path("f"))
    assert np.array_equal(batch["data"], values)
    assert batch["labels"] == [1, 2]


class _Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": _Harm()}),
        pickle.dumps({"data": [_Harm()]}, protocol=0),
        b"cbuiltins\neval\n(Vopen('harm', 'w')\ntR.",
        b"(S'1+1'\nibuiltins\neval\n.",
        b"\x80\x02c_codecs\nencode\n}(X\x08\x00\x00\x00__code__K\x01ub.",
        b"\x80\x02cnumpy\nndarray\n(K\x01tR.",
        pickle.dumps({"data": np.zeros(3)}),
        pickle.dumps({"data": np.array([{}])}),
        pickle.dumps([1, 2]),
        pickle.dumps({"data": 1})[:-3],
        b"",
        b"<html>404</html>",
    ],
)
def test_pickles_run_nothing_and_hold_nothing_but_plain_values(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="f: expected a pickled dictionary of plain values"):
        load_batch(content, Path("f"))
    assert not list(tmp_path.iterdir())


def test_damaged_pickles_raise_nothing_else(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    content = dump_batch({"data": values, "labels": [1, 2, 3], "batch_label": "title"})
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(content)
        position = random.integers(len(damaged))
        damaged[position] ^= 1 << random.integers(8)
        if random.random() < 0.3:
            damaged = damaged[:position]
        try:
            load_batch(bytes(damaged), Path("f"))
        except DatasetError:
            refused += 1
    assert refused > 1000


def test_cifar100_in_both_forms_with_fine_and_coarse_labels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = {
        "fine": [f"fine {number}" for number in range(100)],
        "coarse": [f"coarse {number}" for number in range(20)],
    }
    python, binary = tmp_path / "cifar-100-python", tmp_path / "cifar-100-binary"
    for folder in (python, binary):
        folder.mkdir()
    wanted = {}
    for part, count in (("train", 30), ("test", 10)):
        data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        fine, coarse = random.integers(0, 100, count), random.integers(0, 20, count)
        wanted[part] = data, {"fine": fine, "coarse": coarse}
        batch = {"data": data, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
        (python / part).write_bytes(dump_batch(batch))
        records = np.concatenate((coarse[:, None], fine[:, None], data), axis=1).astype(np.uint8)
        (binary / f"{part}.bin").write_bytes(records.tobytes())
    meta = {f"{kind}_label_names": values for kind, values in names.items()}
    (python / "meta").write_bytes(dump_batch(meta))
    for kind, values in names.items():
        (binary / f"{kind}_label_names.txt").write_text("\n".join(values) + "\n\n")
    for folder in (python, binary):
        for kind in names:
            dataset = load_cifar100(folder, labels=kind)
            assert dataset.classes == tuple(names[kind])
            for part, image_set in dataset.parts.items():
                data, labels = wanted[part]
                assert image_set.labels.tolist() == labels[kind].tolist()
                pixels = image_set.images.permute(0, 3, 1, 2).reshape(-1, 3072)
                assert np.array_equal(pixels.numpy(), data)
    with pytest.raises(DatasetError, match="expected labels to be fine or coarse, got 'medium'"):
        load_cifar100(tmp_path, labels="medium")


def test_grey_images_of_28_pixels_get_colour_and_a_border(tmp_path: Path) -> None:
    dataset = small_dataset(28, 1)
    write_cifar10(dataset, tmp_path)
    images = load_cifar10(tmp_path).train.images
    assert images.shape == (23, 32, 32, 3)
    assert images[:, 2:30, 2:30].equal(dataset.train.images.expand(-1, -1, -1, 3))
    assert images.sum() == 3 * dataset.train.images.sum()


def test_writing_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="28x28 or 32x32 pixels in 1 or 3 channels, got 30x30"):
        write_cifar10(small_dataset(30), tmp_path)
    with pytest.raises(DatasetError, match="got 32x32 in 2"):
        write_cifar10(small_dataset(32, 2), tmp_path)
    with pytest.raises(DatasetError, match="expected a form of python or binary, got 'matlab'"):
        write_cifar10(small_dataset(), tmp_path, form="matlab")


@pytest.mark.parametrize("form", FORMS)
def test_every_damaged_file_is_listed(tmp_path: Path, form: str) -> None:
    folder = write_cifar10(small_dataset(), tmp_path, form=form)
    suffix = ".bin" if form == "binary" else ""
    for name in ("data_batch_2", "test_batch"):
        path = folder / f"{name}{suffix}"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError) as error:
        load_cifar10(tmp_path)
    assert [problem.path.stem for problem in error.value.problems] == ["data_batch_2", "test_batch"]
    for name in ("data_batch_4", "test_batch"):
        (folder / f"{name}{suffix}").unlink()
    with pytest.raises(DatasetError, match="expected a readable file, got: No such file") as error:
        load_cifar10(tmp_path)
    assert [problem.path.stem for problem in error.value.problems] == ["data_batch_4", "test_batch"]


def replace(path: Path, **values: object) -> None:
    path.write_bytes(dump_batch({**load_batch(path.read_bytes(), path), **values}))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("data_batch_1", {"labels": [0, 1]}, "expected 5 labels, one an image, got 2"),
        ("data_batch_1", {"labels": "none"}, "expected labels as a list of integers"),
        ("data_batch_1", {"labels": [11] * 5}, r"expected training labels in 0\.\.9, got 0\.\.11"),
        ("data_batch_1", {"labels": [-1] * 5}, r"expected training labels in 0\.\.9, got -1"),
        ("data_batch_1", {"data": np.zeros((5, 12), np.uint8)}, r"\[N, 3072\], got \[5, 12\]"),
        ("data_batch_1", {"data": [1, 2]}, r"\[N, 3072\], got list"),
        ("batches.meta", {"label_names": [1, 2]}, "a list of names as label_names"),
        ("batches.meta", {"label_names": []}, "the names of the classes, got none"),
    ],
)
def test_contents_that_do_not_fit(
    tmp_path: Path, name: str, values: dict[str, object], message: str
) -> None:
    folder = write_cifar10(small_dataset(), tmp_path)
    replace(folder / name, **values)
    with pytest.raises(DatasetError, match=message):
        load_cifar10(tmp_path)


def test_archives_that_are_damaged_or_lack_files(tmp_path: Path) -> None:
    folder = write_cifar10(small_dataset(), tmp_path / "data")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder / "data_batch_1", "cifar-10-batches-py/data_batch_1")
    with pytest.raises(DatasetError, match=r"got none of data_batch_2, .*batches.meta"):
        load_cifar10(archive)
    archive.write_bytes(archive.read_bytes()[:4000])
    with pytest.raises(DatasetError, match="expected an intact archive"):
        load_cifar10(archive)
    archive.write_bytes(b"<html>404</html>")
    with pytest.raises(DatasetError, match="expected an intact archive"):
        load_cifar10(archive)


def test_says_where_it_looked(tmp_path: Path) -> None:
    for download, reason in ((True, "no network"), (False, "switched off")):
        with pytest.raises(DatasetNotFoundError, match=reason) as error:
            load_cifar10(tmp_path / "data", download=download)
        for place in ("data", "cache"):
            assert str(tmp_path / place) in str(error.value)
