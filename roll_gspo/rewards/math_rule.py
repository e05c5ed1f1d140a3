"""`math_rule`: mathematical equality of the final answer and the ground truth, checked with math-verify."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from roll_gspo.rewards.base import RewardOutput
from roll_gspo.rewards.final_answer import count_boxes, last_boxed, text_after_thinking
from roll_gspo.rewards.math_normalization import candidate_answers, canonical_text

_DELIMITED = re.compile(r"\\boxed|(?<!\\)\$[^$]+(?<!\\)\$")  # an escaped dollar is a currency sign
# math-verify finds units and separators only at the very end of a formula.
_SPACE_AT_END = re.compile(r"\s+(?=\\\]|\\\)|\$\$)")
# After an equals sign, math-verify parses `1,234` as a set.
_SEPARATED = re.compile(r"(=\s*(?:\\\$)?-?\d{1,3})((?:,(?:\\!)?\d{3})+)(?![\d,])")
_WARM_UP_TIMEOUT_S = 60


class MathRule:
    r"""Score 1 if the final answer of the response equals the ground truth, else 0.

    The final answer is the content of the last `\boxed{}`. If the ground truth is a set, all boxes together may also be
    the answer. Without a box, it is the text after "final answer is", else the last number or formula. Text before the
    last `</think>` is ignored.

    The output's answer is the canonical text of the ground truth if the answer equals it. Otherwise it is the canonical
    text of the answer (`math_normalization.canonical_text`), or None if there is no formula.

    Args:
        timeout_s: whole seconds for each parse and each comparison, well below the pool's timeout. A slower response
            fails only its sample. math-verify uses SIGALRM, so the reward must run in the main thread of its process,
            as it does in a worker process.
    """

    def __init__(self, timeout_s: int = 2) -> None:
        if not isinstance(timeout_s, int) or timeout_s < 1:
            raise ValueError(f"math_rule: timeout_s is {timeout_s!r}; use whole seconds, 1 or more")
        self._timeout_s = timeout_s
        # All responses of a group have the same ground truth.
        self._gold = lru_cache(maxsize=4096)(self._parse_ground_truth)
        # Load the grammar now, so that its load time does not count against the first sample.
        one = parse("$1$", parsing_timeout=_WARM_UP_TIMEOUT_S)
        verify(one, one, timeout_seconds=_WARM_UP_TIMEOUT_S)

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        gold, gold_text = self._gold(ground_truth)
        parsed: list[Any] = []
        for text in _final_answers(text_after_thinking(prompt, response)):
            answer = self._parse(text)
            if self._equal(gold, answer):
                return RewardOutput(1.0, gold_text)
            parsed += answer
        return RewardOutput(0.0, canonical_text(parsed))

    def _parse_ground_truth(self, ground_truth: str) -> tuple[list[Any], str | None]:
        # math-verify finds LaTeX only between delimiters, which most datasets omit.
        delimited = _DELIMITED.search(ground_truth) or not ground_truth.strip()
        texts = [ground_truth] if delimited else candidate_answers(ground_truth)
        gold = [formula for text in texts for formula in self._parse(text)]
        if not gold:
            raise ValueError(f"math_rule: the ground truth {ground_truth!r} cannot be parsed; correct the row")
        return gold, canonical_text(gold)

    def _parse(self, text: str) -> list[Any]:
        """Return the possible interpretations of the text's final answer, or an empty list if it has no formula."""
        try:
            return parse(text, parsing_timeout=self._timeout_s, raise_on_error=True)
        except TimeoutException:
            raise TimeoutError(f"math_rule: parsing took longer than timeout_s {self._timeout_s}") from None
        except Exception:  # sympy and its parser raise arbitrary exceptions on text that is no formula
            return []

    def _equal(self, gold: list[Any], answer: list[Any]) -> bool:
        """Return whether any interpretations are equal; those that cannot be compared count as different."""
        timed_out = False
        for expected, given in product(gold, answer):
            try:
                if verify(expected, given, timeout_seconds=self._timeout_s, raise_on_error=True):
                    return True
            except TimeoutException:
                timed_out = True
            except Exception:  # arbitrary, as in `_parse`
                continue
        if timed_out:
            raise TimeoutError(f"math_rule: comparing took longer than timeout_s {self._timeout_s}")
        return False


def _final_answers(answer: str) -> list[str]:
    """Return the texts to parse, in order.

    The last box is tried before the whole text, because math-verify would combine a box and its later correction to a
    set.
    """
    answer = _SPACE_AT_END.sub("", answer)
    answer = _SEPARATED.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), answer)
    box = last_boxed(answer)
    if box is None or not box.strip():
        return [answer]
    texts = candidate_answers(box)
    return texts if count_boxes(answer) < 2 else [*texts, answer]
