"""A parser of written HTML pages, for tests."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "img", "br", "link", "input"}


class ParsedPage(HTMLParser):
    """Checks that tags nest and that ids are unique; collects text, tags and attributes.

    Attributes:
        source: the whole page.
        tags: (tag, attributes) in order.
        text: text outside scripts and style sheets, one line per element.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data + "\n"

    def names(self) -> list[str]:
        """Return the names of all tags."""
        return [tag for tag, _ in self.tags]

    def descriptions(self) -> list[str]:
        """Return the texts of all charts for screen readers."""
        return [str(attributes["aria-label"]) for _, attributes in self.tags if "data-chart" in attributes]

    def charts(self) -> list[dict[str, Any]]:
        """Return the data of all charts."""
        (value,) = [str(attributes["value"]) for _, attributes in self.tags if attributes.get("id") == "charts"]
        data = json.loads(gzip.decompress(base64.b64decode(value)))
        for chart in data["charts"]:
            for series in chart["series"]:
                series["x"] = data["positions"][series["x"]]
        return data["charts"]

    def check_loads_nothing(self) -> None:
        """Assert that no tag loads a file, and that links are relative."""
        for tag, attributes in self.tags:
            assert tag not in ("link", "iframe", "img", "image")
            assert "src" not in attributes
            targets = [str(value) for name, value in attributes.items() if name.endswith("href")]
            assert not any(target.startswith("/") or ":" in target for target in targets)
        policy = [attributes["content"] for _, attributes in self.tags if "http-equiv" in attributes]
        assert "default-src 'none'" in str(policy)
