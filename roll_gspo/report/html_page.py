"""The frame of every page: one HTML file that loads nothing, in light or dark colors."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from roll_gspo.printable import printable
from roll_gspo.report.style import theme_css

_HERE = Path(__file__).parent
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
script-src 'sha256-{digest}'{connect}">
<title>{title}</title><style>{style}</style></head>
<body{version}><header><h1>{title}</h1><p>{subtitle}</p></header><main>{body}</main>
<div id="tip" hidden></div><script>{script}</script></body></html>
"""


def asset(name: str) -> str:
    """Return the text of a style sheet or script in this folder."""
    return (_HERE / name).read_text(encoding="utf-8")


def html_page(
    title: str,
    subtitle: str,
    sections: Iterable[tuple[str, str]],
    style: str = "",
    script: str = "",
    version: str | None = None,
) -> str:
    """Return a page.

    Args:
        title, subtitle: plain text.
        sections: (heading, HTML); sections without HTML are left out.
        style, script: added to those of every page. No other script can run: the page holds a digest of this one.
        version: of the contents, if the page may load newer ones from its server.
    """
    body = "".join(
        f'<section data-name="{heading}">{f"<h2>{heading}</h2>" if heading else ""}{content}</section>'
        for heading, content in sections
        if content
    )
    script = asset("page.js") + script
    return _PAGE.format(
        title=escape(title),
        subtitle=escape(subtitle),
        body=body,
        style=theme_css() + asset("page.css") + style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        connect="" if version is None else "; connect-src 'self'",
        version="" if version is None else f' data-version="{escape(version)}"',
    )


def write_page(path: Path, page: str) -> Path:
    """Write a page atomically and return its path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(printable(page), encoding="utf-8")
    temporary.replace(path)
    return path


def warning_list(warnings: Iterable[str]) -> str:
    """Return warnings as a highlighted list; empty if there are none."""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings">{items}</ul>' if items else ""


def cards(contents: Iterable[str]) -> str:
    """Return cards as a grid; empty if there are none."""
    joined = "".join(contents)
    return f'<div class="cards">{joined}</div>' if joined else ""


def plural(count: int, noun: str) -> str:
    """Return `1 step` or `12 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
