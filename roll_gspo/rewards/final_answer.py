r"""Extraction of the final answer: the text after the thinking, and the content of the last `\boxed{}`."""

from __future__ import annotations

import re

THINKING_START = "<think>"
THINKING_END = "</think>"
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
    starts = {opening.end() for opening in _BOX.finditer(text)}
    unclosed: list[int] = []
    last = (-1, -1)
    for brace in _BRACE.finditer(text):  # escaped braces match `\\.` and are skipped
        if brace.group() == "{":
            unclosed.append(brace.end())
        elif brace.group() == "}" and unclosed and (start := unclosed.pop()) in starts:
            last = max(last, (start, brace.start()))
    return text[slice(*last)] if last[0] >= 0 else None
