"""`exact_match`: the final answer, character by character."""

from __future__ import annotations

from typing import Any

from roll_gspo.rewards.base import Verdict


class ExactMatch:
    """1 where the stripped text after the last `delimiter` is the ground truth, else 0; the verdict has that text.

    A class, so that an unknown argument is an error instead of one more column of the row.

    Args:
        delimiter: what the answer follows; a response without it scores 0. "" compares the whole response.
    """

    def __init__(self, delimiter: str = ":") -> None:
        self._delimiter = delimiter

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> Verdict:
        if self._delimiter not in response:
            return Verdict(0.0)
        answer = (response.rpartition(self._delimiter)[2] if self._delimiter else response).strip()
        return Verdict(float(answer == ground_truth.strip()), answer)
