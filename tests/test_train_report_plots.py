# SPDX-License-Identifier: Apache-2.0
"""Pictures are pictures, as PNG files and within pages."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from run_folders import write_run

from fastresnet.train.confusion import Confusion
from fastresnet.train.plots import (
    ACCURACY,
    COLOURS,
    KAPPA,
    LEARNING_RATE,
    LOSS,
    OVERLAID,
    Line,
    confusion_figure,
    curves_figure,
    line_style,
    overlay_figure,
    recall_figure,
    save_png,
    shade,
    to_svg,
)
from fastresnet.train.run_directory import read_run

CONFUSION = Confusion(np.array([[8, 2, 0], [1, 3, 0], [0, 0, 0]]), ("cat", "dog, small", "none"))


def assert_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 250
    assert pixels.std() > 0.01  # not blank


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_curves(tmp_path: Path, epochs: int) -> None:
    run = read_run(write_run(tmp_path / "run", epochs=epochs, ordinal=True))
    quantities = (LOSS, ACCURACY, KAPPA, LEARNING_RATE)
    figure = curves_figure(run.epochs, quantities, best=run.best["epoch"])
    save_png(figure, tmp_path / "curves.png", title="run")
    assert_picture(tmp_path / "curves.png")


def test_lines_are_at_the_recorded_values(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", epochs=5))
    figure = curves_figure(run.epochs, (LOSS,), best=2)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    best = f"epoch 2: {run.epochs[1]['val_loss']:.4g}"
    assert set(lines) == {"training", "validation", best}
    for label, key in LOSS.keys.items():
        assert lines[label].get_xdata().tolist() == [1, 2, 3, 4, 5]
        assert lines[label].get_ydata().tolist() == [row[key] for row in run.epochs]
    assert lines[best].get_ydata() == [run.epochs[1]["val_loss"]]
    assert figure.axes[0].get_xlim()[0] > 0


def test_a_quantity_that_some_epochs_lack(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "val_kappa": None}, {"epoch": 2, "val_kappa": 0.5}, {"epoch": 3}]
    figure = curves_figure(rows, (KAPPA,), best=3)
    (line,) = figure.axes[0].lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([2], [0.5])
    assert KAPPA.recorded(rows) == {"validation": "val_kappa"}
    assert LOSS.recorded(rows) == {}


@pytest.mark.parametrize("classes", [2, 3, 30])
def test_confusion_and_recall(tmp_path: Path, classes: int) -> None:
    counts = np.arange(classes * classes).reshape(classes, classes)
    confusion = Confusion(counts, tuple(f"class {name}" for name in range(classes)))
    for name, figure in (
        ("confusion", confusion_figure(confusion)),
        ("recall", recall_figure(confusion)),
    ):
        save_png(figure, tmp_path / name, title="run")
        assert_picture(tmp_path / name)


def test_confusion_writes_what_is_counted() -> None:
    figure = confusion_figure(CONFUSION)
    counts, shares = ({text.get_text() for text in axes.texts} for axes in figure.axes)
    assert counts == {"8", "2", "1", "3"}
    assert shares == {"80.0", "20.0", "25.0", "75.0"}


def test_overlay_draws_seeds_and_their_mean(tmp_path: Path) -> None:
    first = ({"epoch": 1, "val_loss": 1.0}, {"epoch": 2, "val_loss": 0.5})
    second = ({"epoch": 1, "val_loss": 2.0},)  # stopped early
    lines = [Line("a", (first, second)), Line("b", (first,))]
    (panel,) = (panel for panel in OVERLAID if panel.key == "val_loss")
    figure = overlay_figure(lines, [panel], legend=True)
    drawn = [(line.get_label(), line.get_ydata().tolist()) for line in figure.axes[0].lines]
    assert [values for _, values in drawn] == [[1.0, 0.5], [2.0], [1.5, 0.5], [1.0, 0.5]]
    assert [label for label, _ in drawn if not label.startswith("_")] == ["a", "b"]
    save_png(figure, tmp_path / "overlay.png", title="runs")
    assert_picture(tmp_path / "overlay.png")


def test_lines_of_a_comparison_differ() -> None:
    styles = [line_style(position) for position in range(32)]
    assert len(set(styles)) == 32
    assert all(colour in COLOURS for colour, _ in styles)


def test_svg_takes_colours_and_ids_of_the_page(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", name='<b>&"'))
    figures = [curves_figure(run.epochs, (LOSS,), best=3) for _ in range(2)]
    figures[0].axes[0].set_title('<b>&"')
    svg, other = (to_svg(figure, name=name) for figure, name in zip(figures, "ab", strict=True))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "width" not in root.attrib  # the page decides
    assert "viewBox" in root.attrib
    assert '<b>&"' in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    for light, _ in COLOURS.values():
        assert light not in svg
    assert {"grey", "blue", "text"} <= set(re.findall(r"var\(--(\w+)\)", svg))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg)
    ids, others = (set(re.findall(r'id="([^"]*)"', text)) for text in (svg, other))
    assert not ids & others
    assert set(re.findall(r'(?:url\(|xlink:href=")#([\w-]*)', svg)) <= ids


def test_svg_is_the_same_each_time(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    texts = {to_svg(curves_figure(run.epochs, (LOSS,), best=3), name="loss") for _ in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_can_be_told_from_their_ground(scheme: int) -> None:
    ground = channels(COLOURS["ground"][scheme])
    for name, pair in COLOURS.items():
        least = 4.5 if name in ("text", "muted", "blue", "orange") else 3
        if name not in ("ground", "grid"):
            assert contrast(channels(pair[scheme]), ground) >= least, name


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("name", ["blue", "orange"])
def test_numbers_can_be_read_on_every_shade(name: str, scheme: int) -> None:
    colour, ground, text = (channels(COLOURS[one][scheme]) for one in (name, "ground", "text"))
    page = 0.96 * ground + 0.04 * text  # an empty cell
    shares = np.linspace(0, 1, 201)
    for share, amount in zip(shares, shade(shares), strict=True):
        cell = (1 - amount) * page + amount * colour
        assert contrast(cell, ground if share > 0.5 else text) >= 4.5, share
    assert (np.diff(shade(shares)) > 0).all()
    assert shade(np.array([0.0, 1.0])).tolist() == [0, 1]


def channels(colour: str) -> np.ndarray:
    return np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(channels: np.ndarray) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
