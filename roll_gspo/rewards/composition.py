"""Combination of several rewards: `combine` and `parts` of a reward block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat

from roll_gspo.errors import RewardError
from roll_gspo.rewards.base import RewardOutput, RewardRequest

Combine = Literal["weighted_sum", "gate", "min"]


@dataclass(frozen=True)
class Part:
    """One reward of a composition.

    Attributes:
        reward: function that takes a request and returns a number or a `RewardOutput`.
        weight: factor of the score in a weighted sum.
        threshold: minimum score that passes if this part is the gate.
    """

    reward: Callable[[RewardRequest], Any]
    weight: float = 1.0
    threshold: float = 1.0


class Composition:
    """A reward that evaluates several parts in order and combines their scores.

    * `weighted_sum`: sum of weight times score over all parts.
    * `min`: lowest score.
    * `gate`: if the score of the first part reaches its threshold, the weighted sum of the other parts. Otherwise
      `else_score`, and the other parts are not evaluated: a cheap gate saves calls of an expensive judge.

    The components of the output are the unweighted scores of the evaluated parts by name, and the components of a part
    as `part/component`. The answer is that of the first part that has one.

    Args:
        combine: one of the three rules above.
        parts: parts by name, in order of evaluation.
        else_score: score of a response that does not pass the gate.
    """

    def __init__(self, combine: Combine, parts: Mapping[str, Part], else_score: float = 0.0) -> None:
        self._combine = combine
        self._parts = dict(parts)
        self._else_score = else_score

    def __call__(self, request: RewardRequest) -> RewardOutput:
        """Score one response.

        Raises:
            RewardError: a part failed; the message starts with its name.
        """
        scores: dict[str, float] = {}
        components: dict[str, float] = {}
        answer = None
        gate = next(iter(self._parts)) if self._combine == "gate" else None
        for name, part in self._parts.items():
            output = _evaluate(name, part.reward, request)
            scores[name] = components[name] = float(output.score)
            components |= {f"{name}/{inner}": float(value) for inner, value in output.components.items()}
            answer = output.answer if answer is None else answer
            if name == gate and scores[name] < part.threshold:
                return RewardOutput(self._else_score, answer, components)
        if self._combine == "min":
            return RewardOutput(min(scores.values()), answer, components)
        total = math.fsum(self._parts[name].weight * score for name, score in scores.items() if name != gate)
        return RewardOutput(total, answer, components)


def _evaluate(name: str, reward: Callable[[RewardRequest], Any], request: RewardRequest) -> RewardOutput:
    try:
        value = reward(request)
    except BaseException as error:  # including SystemExit, as in `worker.evaluate`
        raise RewardError(f"part '{name}': {type(error).__name__}: {error}") from error
    output = value if isinstance(value, RewardOutput) else RewardOutput(value)
    for number in (output.score, *output.components.values()):
        if not isinstance(number, SupportsFloat) or not math.isfinite(float(number)):
            raise RewardError(f"part '{name}': returned {number!r}, not a finite number")
    return output
