"""Several rewards as one: `combine` and `parts` of a reward block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat

from roll_gspo.errors import RewardError
from roll_gspo.rewards.base import RewardRequest, Verdict

Combine = Literal["weighted_sum", "gate", "min"]


@dataclass(frozen=True)
class Part:
    """One of the rewards.

    Attributes:
        reward: takes a request, returns a number or a `Verdict`.
        weight: factor of its score in a sum.
        threshold: what its score must reach where it is the gate.
    """

    reward: Callable[[RewardRequest], Any]
    weight: float = 1.0
    threshold: float = 1.0


class Composition:
    """Parts evaluated in order, and one `Verdict` of them.

    `weighted_sum` is the sum of weight times score over all parts, `min` the lowest score. With `gate`, the first part
    only decides: where its score reaches its threshold, the result is the weighted sum of the others, else it is
    `else_score` and the others are not evaluated, so that a cheap gate saves a costly judge.

    The verdict's components are the scores by part, before weights (and `part/component` where a part has some of its
    own); of parts that were not evaluated there are none. Its answer is that of the first part that gives one.

    Args:
        combine: see above.
        parts: by name, in order.
        else_score: of what does not pass the gate.
    """

    def __init__(self, combine: Combine, parts: Mapping[str, Part], else_score: float = 0.0) -> None:
        self._combine = combine
        self._parts = dict(parts)
        self._else_score = else_score

    def __call__(self, request: RewardRequest) -> Verdict:
        """Score one response.

        Raises:
            RewardError: a part failed; the message begins with its name.
        """
        scores: dict[str, float] = {}
        components: dict[str, float] = {}
        answer = None
        gate = next(iter(self._parts)) if self._combine == "gate" else None
        for name, part in self._parts.items():
            verdict = _evaluate(name, part.reward, request)
            scores[name] = components[name] = float(verdict.score)
            components |= {f"{name}/{inner}": float(value) for inner, value in verdict.components.items()}
            answer = verdict.answer if answer is None else answer
            if name == gate and scores[name] < part.threshold:
                return Verdict(self._else_score, answer, components)
        if self._combine == "min":
            return Verdict(min(scores.values()), answer, components)
        total = math.fsum(self._parts[name].weight * score for name, score in scores.items() if name != gate)
        return Verdict(total, answer, components)


def _evaluate(name: str, reward: Callable[[RewardRequest], Any], request: RewardRequest) -> Verdict:
    try:
        value = reward(request)
    except BaseException as error:  # also sys.exit(), as of a reward that stands alone
        raise RewardError(f"part '{name}': {type(error).__name__}: {error}") from error
    verdict = value if isinstance(value, Verdict) else Verdict(value)
    for number in (verdict.score, *verdict.components.values()):
        if not isinstance(number, SupportsFloat) or not math.isfinite(float(number)):
            raise RewardError(f"part '{name}': returned {number!r}, not a finite number")
    return verdict
