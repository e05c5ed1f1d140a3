"""`format`: whether a response has the required form, whatever it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.registry import did_you_mean
from roll_gspo.rewards.base import Verdict
from roll_gspo.rewards.final_answer import after_thinking, count_boxes, last_box

_REGEX_CHARACTERS = re.compile(r"[\\^$.|?*+()\[\]{}<>\s]")


def _no_tag(*names: str) -> str:
    """Any text without the tags; it cannot backtrack into one."""
    return rf"(?:(?!</?(?:{'|'.join(names)})>).)*"


_THINK = rf"<think>{_no_tag('think', 'answer')}</think>"
_THINK_ANSWER = re.compile(
    rf"{_THINK}\s*<answer>\s*(?=[^\s<]|<(?!/answer>)){_no_tag('think', 'answer')}</answer>", re.S
)
_THINK_TEXT = re.compile(rf"{_THINK}\s*\S{_no_tag('think')}", re.S)


@dataclass(frozen=True)
class _Named:
    """A form, and the tags that each must occur once in it."""

    matches: Callable[[str], bool]
    tags: tuple[str, ...] = ()


PATTERNS: dict[str, _Named] = {
    "think_answer": _Named(
        lambda text: _THINK_ANSWER.fullmatch(text) is not None, ("<think>", "</think>", "<answer>", "</answer>")
    ),
    "think": _Named(lambda text: _THINK_TEXT.fullmatch(text) is not None, ("<think>", "</think>")),
    "boxed": _Named(
        lambda text: count_boxes(text := after_thinking(text)) == 1 and bool((last_box(text) or "").strip())
    ),
}


class Format:
    r"""1 where the whole response (without blanks around it) has the form, else `partial_credit` of what is there.

    Named forms: `think_answer`: `<think>..</think><answer>..</answer>`, each tag once and an answer that is not empty;
    `think`: `<think>..</think>` and then text; `boxed`: one `\boxed{}` with content after the thinking. A template
    that ends with `<think>` has opened the thinking: it counts as the response's.

    A regular expression that takes for ever on some response costs that sample alone: the pool ends the process after
    `timeout_s` and marks the sample as failed.

    Args:
        format_pattern: one of these names, or a regular expression (`.` matches line ends, too).
        partial_credit: below 1: what all tags of a named form are worth where the form does not hold, e.g. in the
            wrong order; each tag that occurs exactly once counts.

    Raises:
        ConfigError: the pattern is not a regular expression, or has no tags to give credit for.
    """

    def __init__(self, format_pattern: str = "think_answer", partial_credit: float = 0.0) -> None:
        if not 0 <= partial_credit < 1:
            raise ConfigError(f"format: partial_credit is {partial_credit}; expected 0 up to, but not including, 1")
        named = PATTERNS.get(format_pattern)
        if partial_credit and not (named and named.tags):
            able = " and ".join(name for name, form in PATTERNS.items() if form.tags)
            raise ConfigError(f"format: partial_credit acts with {able} only, not with '{format_pattern}'; remove it")
        self._form = named or _regular_expression(format_pattern)
        self._partial_credit = partial_credit

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> Verdict:
        opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
        text = (opened + response).strip()
        if self._form.matches(text):
            return Verdict(1.0)
        if not self._partial_credit:
            return Verdict(0.0)
        tags = self._form.tags
        return Verdict(self._partial_credit * sum(text.count(tag) == 1 for tag in tags) / len(tags))


def _regular_expression(pattern: str) -> _Named:
    if not _REGEX_CHARACTERS.search(pattern):  # it could match nothing but itself: a misspelt name
        hint = did_you_mean(pattern, list(PATTERNS))
        raise ConfigError(
            f"format_pattern: '{pattern}' is neither {', '.join(PATTERNS)} nor a regular expression{hint}"
        )
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"format_pattern: {pattern!r} is no regular expression: {error}") from None
    return _Named(lambda text: compiled.fullmatch(text) is not None)
