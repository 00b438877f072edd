# SPDX-License-Identifier: Apache-2.0
"""One folder a class, as in torchvision's ImageFolder: ``train/CLASS/NAME.jpg``.

``train``, ``valid`` (or ``val``) and ``test`` are parts; classes are the folders of the training
part in alphabetical order, whatever the other parts have. Without such folders, the folders of
classes themselves are expected, and the test part is split off by a seed.
"""

from __future__ import annotations

from pathlib import Path

from fastresnet.data.datasets.file_set import FileDataset
from fastresnet.data.datasets.index import IMAGE_SUFFIXES, Entry, Index, find_files

_PARTS = {
    "train": ("train", "training"),
    "validation": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}


def recognises(folder: Path) -> bool:
    """Whether ``folder`` has a training part of class folders, or two class folders of its own."""
    children = _folders(folder)
    parts = _part_folders(children)
    if parts:
        return "train" in parts and any(map(_has_images, _folders(parts["train"])))
    return sum(map(_has_images, children)) >= 2


def load_image_folder(
    folder: Path, *, test_share: float = 0.2, seed: int = 0, allow_missing: bool = False
) -> FileDataset:
    """Loads the names of the images and their classes; no image is opened.

    Args:
        folder: holds the parts, or the classes.
        test_share: where there is but one part, the share of it, of every class in proportion,
            that becomes the test part.
        seed: the seed of that split.
        allow_missing: of no effect: images are found, not listed.

    Raises:
        DatasetError: a class has no image, or the training part lacks a class of another part.
    """
    return index_image_folder(folder).dataset(
        test_share=test_share, seed=seed, allow_missing=allow_missing
    )


def index_image_folder(folder: Path) -> Index:
    """Lists the entries of each part and every problem in the folders."""
    children = _folders(folder)
    parts = _part_folders(children)
    index = Index("image-folder", folder)
    if parts and "train" not in parts:
        index.error(
            "missing", folder, f"expected a folder train beside {', '.join(parts)}, got none"
        )
        return index
    index.classes = tuple(child.name for child in (_folders(parts["train"]) if parts else children))
    listed: list[Path] = []
    for part, base in (parts or {"train": folder}).items():
        entries = index.parts.setdefault(part, [])
        for child in _folders(base):
            images, others = find_files(child)
            if child.name not in index.classes:
                message = "expected a class of the training part, got this folder"
                index.error("label", child, message)
            elif not images and part == "train":
                index.error("label", child, "expected images of this class, got none")
            else:
                label = index.classes.index(child.name)
                entries += [Entry(path, label) for path in images]
            listed += images
            for path in others:
                message = f"expected an image ({', '.join(IMAGE_SUFFIXES)}), got this file"
                index.note("ignored", path, message)
    index.images, _ = find_files(folder)
    index.find_orphans(listed)
    return index


def _folders(folder: Path) -> list[Path]:
    # By name as torchvision does, so that class numbers are the same.
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )


def _part_folders(children: list[Path]) -> dict[str, Path]:
    by_name = {child.name.lower(): child for child in children}
    return {
        part: by_name[name] for part, names in _PARTS.items() for name in names if name in by_name
    }


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
