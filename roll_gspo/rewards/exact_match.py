"""`exact_match`: string equality of the final answer and the ground truth."""

from __future__ import annotations

from typing import Any

from roll_gspo.rewards.base import RewardOutput


class ExactMatch:
    """Score 1 if the stripped text after the last `delimiter` equals the ground truth, else 0.

    The output's answer is that text.

    Args:
        delimiter: text that precedes the answer. A response without it scores 0. If empty, the whole response is the
            answer.
    """

    # A class, because a function with `**row` could not tell an unknown argument from a column of the row.

    def __init__(self, delimiter: str = ":") -> None:
        self._delimiter = delimiter

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        if self._delimiter not in response:
            return RewardOutput(0.0)
        answer = (response.rpartition(self._delimiter)[2] if self._delimiter else response).strip()
        return RewardOutput(float(answer == ground_truth.strip()), answer)
