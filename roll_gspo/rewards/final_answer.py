r"""Extraction of the final answer: the text after the thinking, and the content of the last `\boxed{}`."""

from __future__ import annotations

import re

THINKING_END = "</think>"
# Some models write `\fbox` instead of `\boxed`. The lookahead excludes longer command names.
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def strip_thinking(response: str) -> str:
    """Return the text after the last `</think>`, or the whole response if there is none."""
    return response.rpartition(THINKING_END)[2]


def count_boxes(text: str) -> int:
    r"""Return the number of `\boxed{` in the text."""
    return sum(1 for _ in _BOX.finditer(text))


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{}`, including inner braces, or None if there is none."""
    starts = {opening.end() for opening in _BOX.finditer(text)}
    unclosed: list[int] = []
    last = (-1, -1)
    for brace in _BRACE.finditer(text):  # escaped braces match `\\.` and are skipped
        if brace.group() == "{":
            unclosed.append(brace.end())
        elif brace.group() == "}" and unclosed and (start := unclosed.pop()) in starts:
            last = max(last, (start, brace.start()))
    return text[slice(*last)] if last[0] >= 0 else None
