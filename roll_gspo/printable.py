"""Text from data, models and rewards in a form that is safe to print, log and display.

Such a text may hold escape sequences that control a terminal, characters that reorder or hide the text around them,
and halves of characters that no file can encode.
"""

from __future__ import annotations

import re

# Control characters without tab and newline, zero-width and bidirectional controls, line and paragraph separators,
# surrogates, tags. The joiners U+200C and U+200D stay: Persian, Indic scripts and emoji need them.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Return `text` with every unprintable character as its Python escape, e.g. `\\x1b`. Newlines and tabs stay."""
    return _UNPRINTABLE.sub(_escape, text)


def printable_line(text: str) -> str:
    """Return `text` as one line: like `printable`, with newlines and tabs escaped too."""
    return re.sub(r"[\t\n]", _escape, printable(text))


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
