"""`math_rule`: mathematical equality of the final answer and the ground truth, checked with math-verify."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from roll_gspo.rewards.base import RewardOutput
from roll_gspo.rewards.final_answer import text_after_thinking
from roll_gspo.rewards.math_answers import Answer, read_answer
from roll_gspo.rewards.math_equality import Formulas
from roll_gspo.rewards.math_extraction import final_formulas

# A ground truth that is a text with an answer, not a formula. An escaped dollar is a currency sign.
_SOLUTION = re.compile(r"\\boxed|(?<!\\)\$[^$]+(?<!\\)\$|\\\(|\\\[|answer(?: is|:)|####", re.IGNORECASE)
_WARM_UP_TIMEOUT_S = 60


class MathRule:
    r"""Score 1 if the final answer of the response equals the ground truth, else 0.

    The final answer is the content of the last `\boxed{}`. If the ground truth is a list, the last boxes together may
    also be the answer. Without a box, it is the formula after "final answer is" or "answer is", else the last number or
    formula. Thinking is ignored, and thinking that is not closed has no answer.

    Integers and fractions are compared exactly, decimals relatively (`math_equality.equal_literals`). Answers that are
    too large to parse or to evaluate (`math_bounds`) equal only the same text.

    The output's answer is the canonical text of the ground truth if the answer equals it. Otherwise it is the canonical
    text of the answer (`math_equality.Formulas.canonical`), or None if there is no formula.

    Args:
        timeout_s: whole seconds for each parse and each comparison, well below the pool's timeout. A slower response
            fails only its sample. math-verify uses SIGALRM, so the reward must run in the main thread of its process,
            as it does in a worker process.
    """

    def __init__(self, timeout_s: int = 2) -> None:
        if not isinstance(timeout_s, int) or timeout_s < 1:
            raise ValueError(f"math_rule: timeout_s is {timeout_s!r}; use whole seconds, 1 or more")
        self._formulas = Formulas(timeout_s)
        # All responses of a group have the same ground truth.
        self._gold = lru_cache(maxsize=4096)(self._read_ground_truth)
        # Load the grammar now, so that its load time does not count against the first sample.
        one = parse("$1$", parsing_timeout=_WARM_UP_TIMEOUT_S)
        verify(one, one, timeout_seconds=_WARM_UP_TIMEOUT_S)

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        gold, gold_text = self._gold(ground_truth)
        given = [read_answer(formula) for formula in final_formulas(text_after_thinking(prompt, response))]
        if any(self._formulas.equal(gold, answer) for answer in given):
            return RewardOutput(1.0, gold_text)
        return RewardOutput(0.0, next((self._formulas.canonical(answer) for answer in given), None))

    def _read_ground_truth(self, ground_truth: str) -> tuple[Answer, str | None]:
        formulas = final_formulas(ground_truth) if _SOLUTION.search(ground_truth) else []
        gold = read_answer(formulas[0] if formulas else ground_truth)
        if not ground_truth.strip():
            raise ValueError(f"math_rule: the ground truth {ground_truth!r} cannot be parsed; correct the row")
        return gold, self._formulas.canonical(gold)
