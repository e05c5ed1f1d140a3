"""What a reward is asked and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class RewardRequest:
    """One response to be scored; it pickles.

    Attributes:
        prompt: text of the templated prompt.
        response: text of the response, without special tokens.
        ground_truth: of the data row.
        row: the data row's other columns (`id`, `domain`, `tag`, the file's own).
    """

    prompt: str
    response: str
    ground_truth: str
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a reward may return instead of a number.

    Attributes:
        score: the number.
        answer: the final answer as the reward read it, None where it found none. Answers that count as the same are
            the same text, for majority votes.
        components: the parts that the score is made of, by name, each a finite number.
    """

    score: float
    answer: str | None = None
    components: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class BatchReward(Protocol):
    """A reward that wants several responses at once, e.g. a model: a class with this method instead of `__call__`."""

    def score_batch(self, requests: Sequence[RewardRequest]) -> Sequence[float | Verdict]:
        """One number or verdict a request, in their order; at most `infer_batch_size` requests come at once.

        A batch in which one raises, hangs or dies is taken apart: each of its samples is scored once more, alone.
        """
        ...


@dataclass(frozen=True)
class RewardResult:
    """What came of one request.

    Attributes:
        score: finite; 0 where the reward failed, and then to be left out of everything.
        failed: why there is no score (raised, returned no finite number, hung, died), else None.
        answer, components: as in `Verdict`.
    """

    score: float
    failed: str | None = None
    answer: str | None = None
    components: Mapping[str, float] = field(default_factory=dict)
