# SPDX-License-Identifier: Apache-2.0
"""HTML pages that are one file: styles, figures and images are in it, and it asks for nothing."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from fastresnet import __version__
from fastresnet.train.plots import COLOURS, shade, to_svg

_THUMBNAIL = 192  # pixels of the longer side, at most


@dataclass(frozen=True)
class Drawing:
    """A figure of a page, and what it shows in words."""

    svg: Markup
    alt: str


def draw(figure: Figure, *, name: str, alt: str) -> Drawing:
    """Makes a drawing of a figure (:func:`fastresnet.train.plots.to_svg`)."""
    # matplotlib escapes the text that it writes into an SVG.
    return Drawing(Markup(to_svg(figure, name=name)), alt)


def render(template: str, **values: Any) -> str:
    """Fills a template of ``fastresnet/train/templates``; every string in ``values`` is escaped
    unless it is a ``Markup``."""
    return _environment().get_template(template).render(version=__version__, **values)


def thumbnail(pixels: np.ndarray) -> str:
    """An image (uint8 [H, W, C] or [H, W], of 1 or 3 channels) as a ``data:`` address.

    Raises:
        ValueError: another dtype or shape.
    """
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3):
        raise ValueError(
            f"expected an image, uint8 [H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    # Small images whole and sharp; photographs in a fraction of the bytes.
    kind, options = ("png", {}) if max(image.size) <= 64 else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def flatten(settings: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted name, value), in their order."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, prefix=f"{prefix}{name}.")
        else:
            yield prefix + name, value


def percent(share: float | None, digits: int = 2) -> str:
    """A share as a percentage; a dash where there is none."""
    return _or_dash(share, lambda value: f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%")


def number(value: Any) -> str:
    """A number in at most four digits behind those that count; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return text(value)
    if isinstance(value, int):
        return f"{value:,}"
    return _or_dash(value, lambda value: f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}")


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    return _or_dash(seconds, _duration)


def text(value: Any) -> str:
    """A setting as it is typed on the command line."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return ", ".join(map(text, value)) or "none"
        case float():
            return f"{value:.6g}"
    return str(value)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _or_dash(value: float | None, form: Any) -> str:
    missing = value is None or not math.isfinite(value)
    return "\N{EN DASH}" if missing else form(value)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fastresnet.train"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        number=number,
        duration=duration,
        setting=text,
        flatten=flatten,
        shade=shade,
    )
    environment.globals["colours"] = COLOURS
    return environment
