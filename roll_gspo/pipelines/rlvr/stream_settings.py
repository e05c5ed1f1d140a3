"""Settings of the groups in flight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from roll_gspo.algorithms.query_filter import QueryFilterSettings
from roll_gspo.strategies.base import Sampling

PartialRollouts = Literal["continue", "restart", "drop"]


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Settings of the groups in flight.

    Attributes:
        sampling: sampling settings of the responses.
        groups_per_step: groups per training step.
        num_steps: training steps of the whole run; no group starts that could only be trained later.
        max_staleness: largest number of steps between the weights that sample tokens and those that are trained.
        in_flight: weights change while responses are being sampled, and groups are trained as they finish.
        partial_rollouts: what happens to unfinished responses when the weights change.
        query_filters: filter by domain that drops groups. Domains without a filter keep all groups.
        max_rounds: limit of prompts per step, in multiples of `groups_per_step`. Then dropped groups fill the batch.
    """

    sampling: Sampling
    groups_per_step: int
    num_steps: int
    max_staleness: int = 0
    in_flight: bool = False
    partial_rollouts: PartialRollouts = "continue"
    query_filters: Mapping[str, QueryFilterSettings] = field(default_factory=dict)
    max_rounds: int = 10

    @property
    def max_draws(self) -> int:
        """Largest number of prompts per step."""
        return self.max_rounds * self.groups_per_step
