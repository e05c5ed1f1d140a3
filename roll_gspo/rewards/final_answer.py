r"""Extraction of the final answer: the text after the thinking, and the content of the last `\boxed{}`."""

from __future__ import annotations

import re
from dataclasses import dataclass

THINKING_START = "<think>"
THINKING_END = "</think>"
MAX_BOXES = 20
# Some models write `\fbox` instead of `\boxed`. The lookahead excludes longer command names.
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def text_after_thinking(prompt: str, response: str) -> str:
    """Return the text that may contain the answer: everything after the last `</think>`, or the whole response.

    Thinking that was opened and not closed has no answer, so the result is empty. It may be opened by `<think>` in the
    response, or at the end of the prompt by the chat template.

    Args:
        prompt: text of the prompt, with the chat template applied.
        response: text of the response, with special tokens.
    """
    _, end, text = response.rpartition(THINKING_END)
    opened_by_prompt = not end and opens_thinking(prompt)
    return "" if opened_by_prompt or THINKING_START in text else text


def opens_thinking(prompt: str) -> bool:
    """Return whether the prompt ends with `<think>`, so that the response begins inside the thinking."""
    return prompt.rstrip().endswith(THINKING_START)


def count_boxes(text: str) -> int:
    r"""Return the number of `\boxed{` in the text."""
    return sum(1 for _ in _BOX.finditer(text))


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{}`, including inner braces, or None if there is none."""
    found = boxes(text)
    return found[-1].content if found else None


@dataclass(frozen=True)
class Box:
    """A complete `\\boxed{}` at `text[start:end]`."""

    start: int
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    r"""Return every complete `\boxed{}`, in order. The time is linear in the text."""
    starts = {opening.end(): opening.start() for opening in _BOX.finditer(text)}
    unclosed: list[int] = []
    found: list[tuple[int, int, int]] = []
    for brace in _BRACE.finditer(text):  # escaped braces match `\\.` and are skipped
        if brace.group() == "{":
            unclosed.append(brace.end())
        elif brace.group() == "}" and unclosed and (start := unclosed.pop()) in starts:
            found.append((starts[start], start, brace.start()))
    # Contents of nested boxes would add up to quadratic size, so only those of the last boxes are copied.
    return [Box(start, end + 1, text[content:end]) for start, content, end in sorted(found)[-MAX_BOXES:]]
