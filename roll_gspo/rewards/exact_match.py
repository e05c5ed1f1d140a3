"""`exact_match`: string equality of the final answer and the ground truth."""

from __future__ import annotations

from typing import Any

from roll_gspo.rewards.base import RewardOutput
from roll_gspo.rewards.final_answer import text_after_thinking


class ExactMatch:
    """Score 1 if the stripped text after the last `delimiter` equals the ground truth, else 0.

    Thinking is ignored: a response whose thinking is not closed scores 0. The output's answer is the compared text.

    Args:
        delimiter: text that precedes the answer. A response without it scores 0. If empty, the answer is the whole text
            after the thinking.
    """

    # A class, because a function with `**row` could not tell an unknown argument from a column of the row.

    def __init__(self, delimiter: str = ":") -> None:
        self._delimiter = delimiter

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        text = text_after_thinking(prompt, response)
        if not text or self._delimiter not in text:
            return RewardOutput(0.0)
        answer = (text.rpartition(self._delimiter)[2] if self._delimiter else text).strip()
        return RewardOutput(float(answer == ground_truth.strip()), answer)
