"""`format`: check that a response has a required form; its content does not matter."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.registry import did_you_mean
from roll_gspo.rewards.base import RewardOutput
from roll_gspo.rewards.final_answer import (
    THINKING_START,
    count_boxes,
    last_boxed,
    opens_thinking,
    text_after_thinking,
)

_REGEX_CHARACTERS = re.compile(r"[\\^$.|?*+()\[\]{}<>\s]")


def _no_tag(*names: str) -> str:
    """Return a pattern of any text that contains none of the tags."""
    return rf"(?:(?!</?(?:{'|'.join(names)})>).)*"


_THINK = rf"<think>{_no_tag('think', 'answer')}</think>"
_THINK_ANSWER = re.compile(
    rf"{_THINK}\s*<answer>\s*(?=[^\s<]|<(?!/answer>)){_no_tag('think', 'answer')}</answer>", re.S
)
_THINK_TEXT = re.compile(rf"{_THINK}\s*\S{_no_tag('think')}", re.S)


@dataclass(frozen=True)
class _Form:
    """A required form, and the tags that must each occur once in it."""

    matches: Callable[[str], bool]
    tags: tuple[str, ...] = ()


PATTERNS: dict[str, _Form] = {
    "think_answer": _Form(
        lambda text: _THINK_ANSWER.fullmatch(text) is not None, ("<think>", "</think>", "<answer>", "</answer>")
    ),
    "think": _Form(lambda text: _THINK_TEXT.fullmatch(text) is not None, ("<think>", "</think>")),
    "boxed": _Form(
        lambda text: count_boxes(text := text_after_thinking("", text)) == 1 and bool((last_boxed(text) or "").strip())
    ),
}


class Format:
    r"""Score 1 if the whole stripped response has the form, else up to `partial_credit`.

    Named forms:

    * `think_answer`: `<think>..</think><answer>..</answer>`, each tag once, with a nonempty answer.
    * `think`: `<think>..</think>` followed by text.
    * `boxed`: exactly one `\boxed{}` after the thinking, with content.

    If the prompt ends with `<think>`, that tag counts as part of the response.

    If a regular expression backtracks without end on a response, only that sample fails: the pool kills the process
    after `timeout_s`.

    Args:
        format_pattern: name of a form, or a regular expression (`.` also matches newlines).
        partial_credit: score below 1 for all tags of a named form if the form does not match, e.g. because of their
            order. Each tag that occurs exactly once adds an equal share.

    Raises:
        ConfigError: the pattern is no regular expression, or `partial_credit` is set for a form without tags.
    """

    def __init__(self, format_pattern: str = "think_answer", partial_credit: float = 0.0) -> None:
        if not 0 <= partial_credit < 1:
            raise ConfigError(f"format: partial_credit is {partial_credit}; expected 0 up to, but not including, 1")
        named = PATTERNS.get(format_pattern)
        if partial_credit and not (named and named.tags):
            supported = " and ".join(name for name, form in PATTERNS.items() if form.tags)
            raise ConfigError(
                f"format: partial_credit works with {supported} only, not with '{format_pattern}'; remove it"
            )
        self._form = named or _regular_expression(format_pattern)
        self._partial_credit = partial_credit

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        prefix = THINKING_START if opens_thinking(prompt) else ""
        text = (prefix + response).strip()
        if self._form.matches(text):
            return RewardOutput(1.0)
        if not self._partial_credit:
            return RewardOutput(0.0)
        tags = self._form.tags
        return RewardOutput(self._partial_credit * sum(text.count(tag) == 1 for tag in tags) / len(tags))


def _regular_expression(pattern: str) -> _Form:
    if not _REGEX_CHARACTERS.search(pattern):  # it would match only itself, so it is a misspelt name
        hint = did_you_mean(pattern, list(PATTERNS))
        raise ConfigError(
            f"format_pattern: '{pattern}' is neither {', '.join(PATTERNS)} nor a regular expression{hint}"
        )
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"format_pattern: {pattern!r} is no regular expression ({error}); correct it") from None
    return _Form(lambda text: compiled.fullmatch(text) is not None)
