# SPDX-License-Identifier: Apache-2.0
"""Reads files of labels, keeping the line numbers that an editor shows."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from fastresnet.data.datasets.errors import DatasetError


@dataclass(frozen=True)
class Row:
    """A line of a file: its number, from 1, and its cells without the blanks around them."""

    number: int
    cells: tuple[str, ...]


def read_csv(path: Path) -> list[Row]:
    """The rows of a file of comma-separated values, without those that are empty.

    Raises:
        DatasetError: the file cannot be read, or is not UTF-8 text.
    """
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    rows.append(Row(reader.line_num, tuple(cell.strip() for cell in cells)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError.at(
            path, f"expected comma-separated values in UTF-8, got: {error}", kind="header"
        ) from error
    return rows


def find_column(header: Row, *names: str) -> int | None:
    """The place of the first column that has one of the names, whatever its case."""
    cells = [cell.lower().replace("_", " ") for cell in header.cells]
    return next((cells.index(name) for name in names if name in cells), None)


def whole_number(text: str) -> int | None:
    """The number that ``text`` is, such as 2 or 2.0, or None where it is anything else."""
    return int(text.partition(".")[0]) if re.fullmatch(r"[0-9]{1,9}(\.0*)?", text) else None
