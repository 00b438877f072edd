# SPDX-License-Identifier: Apache-2.0
"""Sets of files: reading, splitting by labels and groups, and the listing of their problems."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastresnet.data import DatasetError, FileDataset, FileSet
from fastresnet.data.datasets.errors import Problem
from fastresnet.data.datasets.index import Entry, Index, find_files
from fastresnet.data.datasets.split import hold_out
from fastresnet.data.datasets.table import read_csv, whole_number
from fastresnet.data.decode import ImageError


def file_set(count: int, *, groups: torch.Tensor | None = None) -> FileSet:
    return FileSet(
        tuple(Path(f"{number}.jpeg") for number in range(count)), torch.arange(count) % 3, groups
    )


def test_reading_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpeg").write_bytes(b"content")
    paths = (tmp_path / "a.jpeg", tmp_path / "b.jpeg", tmp_path)
    files = FileSet(paths, torch.zeros(3, dtype=torch.int64))
    assert files.read(0) == b"content"
    for index, reason in ((1, "No such file"), (2, "Is a directory")):
        with pytest.raises(ImageError, match=f"expected a readable file, got: {reason}") as error:
            files.read(index)
        assert error.value.kind == "missing"


def test_subsets_keep_paths_labels_and_groups_together() -> None:
    part = file_set(6, groups=torch.arange(6) // 2).subset(torch.tensor([4, 1]))
    assert [str(path) for path in part.paths] == ["4.jpeg", "1.jpeg"]
    assert (part.labels.tolist(), part.groups.tolist()) == ([1, 1], [2, 0])


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=200),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_each_label_is_held_out_in_its_share(labels: list[int], share: float, seed: int) -> None:
    values = torch.tensor(labels)
    wanted = round(share * len(labels))
    if not 0 < wanted < len(labels):
        with pytest.raises(DatasetError, match="expected a share that leaves images on both sides"):
            hold_out(values, share, seed=seed)
        return
    rest, held = hold_out(values, share, seed=seed)
    assert len(held) == wanted
    assert sorted(rest.tolist() + held.tolist()) == list(range(len(labels)))
    assert rest.equal(rest.sort().values)
    assert held.equal(held.sort().values)
    for label in set(labels):
        count = labels.count(label)
        assert abs((values[held] == label).sum() - share * count) < 1
    assert hold_out(values, share, seed=seed)[1].equal(held)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=10, max_size=60),
    share=st.floats(0.2, 0.8),
    seed=st.integers(0, 5),
)
def test_groups_stay_whole(sizes: list[int], share: float, seed: int) -> None:
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) * 7
    labels = torch.arange(len(groups)) % 3
    rest, held = hold_out(labels, share, seed=seed, groups=groups)
    assert sorted(rest.tolist() + held.tolist()) == list(range(len(groups)))
    assert not set(groups[rest].tolist()) & set(groups[held].tolist())
    assert abs(len(held) - share * len(groups)) <= 4


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(DatasetError, match="a share that leaves groups of images on both sides"):
        hold_out(torch.arange(9) % 3, 0.5, seed=0, groups=torch.ones(9, dtype=torch.int64))


def test_groups_are_held_out_in_proportion_of_labels() -> None:
    # Two eyes a patient, graded as in the retinopathy set: 73 % are of grade 0, 2 % of grade 4.
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.735, 0.07, 0.15, 0.025, 0.02])
    labels = torch.multinomial(shares, 8000, replacement=True, generator=generator)
    groups = torch.arange(8000) // 2
    for seed in range(3):
        _, held = hold_out(labels, 0.2, seed=seed, groups=groups)
        wanted = torch.bincount(labels) * 0.2
        assert (torch.bincount(labels[held]) - wanted).abs().max() <= 2
        assert abs(len(held) - 1600) <= 2
    assert not hold_out(labels, 0.2, seed=0, groups=groups)[1].equal(
        hold_out(labels, 0.2, seed=1, groups=groups)[1]
    )


def test_file_sets_refuse_what_does_not_fit() -> None:
    paths = (Path("a"), Path("b"))
    with pytest.raises(
        DatasetError, match=r"expected labels as int64 \[2\], got torch.int64 \[3\]"
    ):
        FileSet(paths, torch.arange(3))
    with pytest.raises(DatasetError, match=r"expected groups as int64 \[2\], got torch.float32"):
        FileSet(paths, torch.arange(2), torch.zeros(2))
    with pytest.raises(DatasetError, match=r"expected validation labels in 0\.\.1, got 0\.\.2"):
        FileDataset("n", file_set(2), None, ("a", "b"), "here", validation=file_set(3))
    with pytest.raises(DatasetError, match="the training part holds no image"):
        FileDataset("n", file_set(0), None, ("a", "b"), "here")
    assert list(FileDataset("n", file_set(3), None, ("a", "b", "c"), "here").parts) == ["train"]


def test_an_error_lists_the_first_twenty_problems_and_counts_the_rest() -> None:
    problems = [Problem("label", Path("l.csv"), row, "expected 1, got 2") for row in range(1, 31)]
    error = DatasetError.listing("here", problems)
    lines = str(error).splitlines()
    assert lines[0] == "here: 30 problems"
    assert lines[1].strip() == "l.csv:1: expected 1, got 2"
    assert lines[20].strip() == "l.csv:20: expected 1, got 2"
    assert lines[21].strip() == "and 10 more"
    assert len(error.problems) == 30
    assert str(DatasetError.at(Path("f"), "expected 1, got 2")) == "f: expected 1, got 2"


def test_an_index_splits_only_what_has_but_one_part() -> None:
    def entries(count: int) -> list[Entry]:
        return [Entry(Path(f"{number}"), number % 2) for number in range(count)]

    index = Index("layout", Path("here"), ("a", "b"), {"train": entries(10)})
    dataset = index.dataset()
    assert (len(dataset.train), len(dataset.test), dataset.validation) == (8, 2, None)
    assert index.dataset(test_share=0).test is None
    assert dataset.source == "here (layout layout)"
    index.parts["validation"] = entries(4)
    dataset = index.dataset()
    assert (len(dataset.train), dataset.test, len(dataset.validation)) == (10, None, 4)
    assert dataset.train.groups is None
    index.note("orphan", Path("x"), "no harm")
    index.error("missing", Path("y"), "gone")
    assert len(index.dataset(allow_missing=True).train) == 10
    with pytest.raises(DatasetError, match="y: gone"):
        index.dataset()


def test_files_are_found_through_links_but_once(tmp_path: Path) -> None:
    real = tmp_path / "real"
    for name in ("b/2.JPG", "b/1.png", "a.txt", ".hidden/3.png", "b/.4.png"):
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        (real / name).touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(real)
    (real / "loop").symlink_to(folder)
    images, others = find_files(folder)
    assert [str(path.relative_to(folder)) for path in images] == ["link/b/1.png", "link/b/2.JPG"]
    assert [path.name for path in others] == ["a.txt"]


def test_rows_keep_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b'\xef\xbb\xbfimage, level\r\n\r\n a ,1\r\n"b,c",2\r\n , \r\n')
    rows = [(row.number, row.cells) for row in read_csv(path)]
    assert rows == [(1, ("image", "level")), (3, ("a", "1")), (4, ("b,c", "2"))]
    path.write_bytes("image,level".encode("utf-16"))
    with pytest.raises(DatasetError, match=r"labels.csv: expected comma-separated values in UTF-8"):
        read_csv(path)
    with pytest.raises(DatasetError, match="No such file"):
        read_csv(tmp_path / "none.csv")


def test_whole_numbers() -> None:
    assert [whole_number(text) for text in ("0", "12", "3.0", "3.")] == [0, 12, 3, 3]
    for text in ("", "-1", "1.5", "one", "1e3", "9" * 10, "²", "٣", "1 2", "nan", "3.0\n"):
        assert whole_number(text) is None
