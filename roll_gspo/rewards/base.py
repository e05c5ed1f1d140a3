"""Types that pass between the trainer and a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class RewardRequest:
    """One response to score. Instances can be pickled.

    Attributes:
        prompt: text of the prompt, with the chat template applied.
        response: text of the response with special tokens such as `<think>`, without end-of-sequence and padding.
        ground_truth: expected answer of the data row.
        row: other columns of the data row (`id`, `domain`, `tag` and the columns of the data file).
    """

    prompt: str
    response: str
    ground_truth: str
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardOutput:
    """Score of a response with details; a reward may return it instead of a number.

    Attributes:
        score: the reward.
        answer: final answer that the reward extracted, or None if it found none. Equivalent answers must have the same
            text, because majority votes compare texts.
        components: named finite numbers that the score is computed from.
    """

    score: float
    answer: str | None = None
    components: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class BatchReward(Protocol):
    """A reward that scores several responses per call, e.g. with a model. It has this method instead of `__call__`."""

    def score_batch(self, requests: Sequence[RewardRequest]) -> Sequence[float | RewardOutput]:
        """Return one number or `RewardOutput` per request, in order.

        If a batch raises, times out or kills its process, each of its samples is scored again alone.

        Args:
            requests: at most `infer_batch_size` requests.
        """
        ...


@dataclass(frozen=True)
class RewardResult:
    """Result of one request: a score, or the reason why there is none.

    Attributes:
        score: finite number; 0 if the reward failed.
        failed: reason of the failure (exception, invalid number, timeout, dead process), or None. Failed samples are
            excluded from the loss and from every statistic.
        answer, components: see `RewardOutput`.
        traceback: the frames of the reward in which it raised, with file and line; empty if it did not raise.
    """

    score: float
    failed: str | None = None
    answer: str | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    traceback: str = ""
