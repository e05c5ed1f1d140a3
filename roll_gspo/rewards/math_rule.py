"""`math_rule`: mathematical equality of the final answer with the ground truth, by the math-verify library."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

_THINKING_END = "</think>"
_DELIMITED = re.compile(r"\\boxed|(?<!\\)\$[^$]+(?<!\\)\$")  # an escaped dollar is money
_WARM_UP_TIMEOUT_S = 60


class MathRule:
    r"""1 where the response's final answer equals the ground truth, else 0.

    The final answer is the last `\boxed{}`, or all of them taken as a set where the ground truth is one, else what
    follows "final answer is", else the last number or formula.
    What was thought aloud before the last `</think>` does not count.

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

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> float:
        gold = self._gold(ground_truth)
        return float(any(self._equal(gold, self._parse(text)) for text in _final_answers(response)))

    def _parse_ground_truth(self, ground_truth: str) -> list[Any]:
        # The library finds LaTeX only between delimiters, which most data sets leave out.
        delimited = _DELIMITED.search(ground_truth) or not ground_truth.strip()
        gold = self._parse(ground_truth if delimited else f"\\boxed{{{ground_truth}}}")
        if not gold:
            raise ValueError(f"math_rule: the ground truth {ground_truth!r} cannot be parsed; correct the row")
        return gold

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
    answer = response.rpartition(_THINKING_END)[2]
    last_box = answer.rfind("\\boxed")
    return [answer] if answer.count("\\boxed") < 2 else [answer[last_box:], answer]
