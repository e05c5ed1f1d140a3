r"""Where a response says its answer: after the thinking, in a `\boxed{}`."""

from __future__ import annotations

import re

THINKING_END = "</think>"
# `\fbox` is what models write that mean `\boxed`; a longer command name is another command.
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def after_thinking(response: str) -> str:
    """What follows the last `</think>`; all of it where there is none."""
    return response.rpartition(THINKING_END)[2]


def count_boxes(text: str) -> int:
    r"""How many `\boxed{` are opened."""
    return sum(1 for _ in _BOX.finditer(text))


def last_box(text: str) -> str | None:
    r"""What the last complete `\boxed{}` holds, with its inner braces; None where there is none."""
    starts = {opening.end() for opening in _BOX.finditer(text)}
    unclosed: list[int] = []
    last = (-1, -1)
    for brace in _BRACE.finditer(text):  # an escaped brace is a character
        if brace.group() == "{":
            unclosed.append(brace.end())
        elif brace.group() == "}" and unclosed and (start := unclosed.pop()) in starts:
            last = max(last, (start, brace.start()))
    return text[slice(*last)] if last[0] >= 0 else None
