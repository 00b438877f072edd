# SPDX-License-Identifier: Apache-2.0
"""An HTML page, taken apart strictly: tests ask it for sections, text, tables and addresses."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

_VOID = {"br", "img", "input", "link", "meta"}
# What a browser would fetch, follow or run.
_ADDRESSES = ("src", "href", "srcset", "xlink:href", "data", "action", "poster")


class Page(HTMLParser):
    """Parses a file; an element that is not closed, or closed by another, is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.sections: dict[str, str] = {}
        self.tables: dict[str, list[list[list[str]]]] = {}  # of each section: tables, rows, cells
        self._open: list[str] = []
        self._section = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    @property
    def text(self) -> str:
        return " ".join(self.sections.values())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._add(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._add(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        self._open.pop()
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if "style" in self._open or "script" in self._open:
            self._find_urls(data)
            return
        text = re.sub(r"[ \n]+", " ", data).strip(" ")  # no-break spaces stay
        if not text:
            return
        self.sections[self._section] = f"{self.sections.get(self._section, '')} {text}".strip()
        if {"td", "th"} & set(self._open) and "svg" not in self._open:
            cells = self.tables[self._section][-1][-1]
            cells[-1] = f"{cells[-1]} {text}".strip()

    def _add(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.addresses += [attributes[name] or "" for name in _ADDRESSES if name in attributes]
        self._find_urls(attributes.get("style") or "")
        match tag:
            case "section":
                self._section = attributes["id"]
            case "table":
                self.tables.setdefault(self._section, []).append([])
            case "tr":
                self.tables[self._section][-1].append([])
            case "td" | "th":
                self.tables[self._section][-1][-1].append("")

    def _find_urls(self, text: str) -> None:
        self.addresses += re.findall(r"url\(\s*['\"]?([^)'\"]*)", text)
        assert "@import" not in text


def assert_sound(page: Page) -> None:
    """One file that asks for nothing, and that can be read without seeing it."""
    assert page.source.startswith("<!doctype html>")
    for address in page.addresses:
        assert address.startswith(("#", "data:image/")), address
        if address.startswith("#"):
            assert address[1:] in page.ids, address
    assert len(page.ids) == len(set(page.ids))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert page.of("html")[0]["lang"]
    assert len(page.of("h1")) == len(page.of("main")) == 1
    assert page.source.partition("</head>")[0].count("<title>") == 1
    assert all(image["alt"] for image in page.of("img"))
    assert all(heading["scope"] in ("row", "col") for heading in page.of("th"))
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in page.of("figure"))
    # Every property that is used without another value beside it is defined.
    defined = set(re.findall(r"(--[\w-]+):", page.source))
    assert set(re.findall(r"var\((--[\w-]+)\)", page.source)) <= defined
