"""`math_rule`: mathematical equality of the final answer with the ground truth, by the math-verify library."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from roll_gspo.rewards.base import Verdict
from roll_gspo.rewards.final_answer import after_thinking, count_boxes, last_box
from roll_gspo.rewards.math_text import canonical_text, readings

_DELIMITED = re.compile(r"\\boxed|(?<!\\)\$[^$]+(?<!\\)\$")  # an escaped dollar is money
# The library looks for units and separators at the very ends of a formula.
_SPACE_AT_END = re.compile(r"\s+(?=\\\]|\\\)|\$\$)")
# After an equals sign the library makes a set of `1,234`.
_SEPARATED = re.compile(r"(=\s*(?:\\\$)?-?\d{1,3})((?:,(?:\\!)?\d{3})+)(?![\d,])")
_WARM_UP_TIMEOUT_S = 60


class MathRule:
    r"""1 where the response's final answer equals the ground truth, else 0; the verdict has the answer, too.

    The final answer is the last `\boxed{}`, or all of them taken as a set where the ground truth is one, else what
    follows "final answer is", else the last number or formula.
    What was thought aloud before the last `</think>` does not count.

    The verdict's answer is that of the ground truth for whatever equals it, else the formula in a fixed notation
    (`math_text.canonical_text`), None where there is no mathematics.

    Args:
        timeout_s: whole seconds for each parsing and each comparison, well below the pool's own timeout.
            math-verify keeps them by SIGALRM, so this must run in the main thread of its process, as it does
            in a pool's worker. A response that takes longer fails its sample without costing the worker.
    """

    def __init__(self, timeout_s: int = 2) -> None:
        if not isinstance(timeout_s, int) or timeout_s < 1:
            raise ValueError(f"timeout_s is {timeout_s!r}; math-verify counts whole seconds, give 1 or more")
        self._timeout_s = timeout_s
        # The responses of a group share their ground truth.
        self._gold = lru_cache(maxsize=4096)(self._parse_ground_truth)
        # The grammar is loaded at first use: now, not on the clock of the first sample.
        one = parse("$1$", parsing_timeout=_WARM_UP_TIMEOUT_S)
        verify(one, one, timeout_seconds=_WARM_UP_TIMEOUT_S)

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> Verdict:
        gold, gold_text = self._gold(ground_truth)
        read: list[Any] = []
        for text in _final_answers(response):
            answer = self._parse(text)
            if self._equal(gold, answer):
                return Verdict(1.0, gold_text)
            read += answer
        return Verdict(0.0, canonical_text(read))

    def _parse_ground_truth(self, ground_truth: str) -> tuple[list[Any], str | None]:
        # The library finds LaTeX only between delimiters, which most data sets leave out.
        delimited = _DELIMITED.search(ground_truth) or not ground_truth.strip()
        texts = [ground_truth] if delimited else readings(ground_truth)
        gold = [formula for text in texts for formula in self._parse(text)]
        if not gold:
            raise ValueError(f"math_rule: the ground truth {ground_truth!r} cannot be parsed; correct the row")
        return gold, canonical_text(gold)

    def _parse(self, text: str) -> list[Any]:
        """The readings of a text's final answer; none where it has no mathematics."""
        try:
            return parse(text, parsing_timeout=self._timeout_s, raise_on_error=True)
        except TimeoutException:
            raise TimeoutError(f"math_rule: parsing took over {self._timeout_s} s") from None
        except Exception:  # sympy and its parser raise anything on text that is no formula
            return []

    def _equal(self, gold: list[Any], answer: list[Any]) -> bool:
        """Whether any reading of the one equals any of the other; readings that cannot be compared differ."""
        slow = False
        for expected, given in product(gold, answer):
            try:
                if verify(expected, given, timeout_seconds=self._timeout_s, raise_on_error=True):
                    return True
            except TimeoutException:
                slow = True
            except Exception:  # as above
                continue
        if slow:
            raise TimeoutError(f"math_rule: comparing took over {self._timeout_s} s")
        return False


def _final_answers(response: str) -> list[str]:
    """Where to look, in turn; the library by itself would make a set of a box and its later correction."""
    answer = _SPACE_AT_END.sub("", after_thinking(response))
    answer = _SEPARATED.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), answer)
    box = last_box(answer)
    if box is None or not box.strip():
        return [answer]
    texts = readings(box)
    return texts if count_boxes(answer) < 2 else [*texts, answer]
