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
    for opening in reversed(list(_BOX.finditer(text))):
        depth = 1
        for brace in _BRACE.finditer(text, opening.end()):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # an escaped brace is a character
            if depth == 0:
                return text[opening.end() : brace.start()]
    return None
