"""Top-level keys of asynchronous training: how old the weights of a trained token may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeInt

from roll_gspo.config.base import Problem, Schema, used_only_with


class AsyncConfig(Schema):
    """Generation that runs ahead of training."""

    async_generation_ratio: NonNegativeInt = 0
    """Staleness limit: a trained token was sampled by weights that are at most this many steps old. 0 generates and
    trains in turn."""
    async_mode: Literal["one_step_off", "in_flight"] = "one_step_off"
    """`one_step_off`: the batch of step k is sampled entirely by the weights of step k - 1 - `async_generation_ratio`;
    a run can be repeated bit for bit. `in_flight`: weights change while responses are being sampled, and groups are
    trained as they finish."""
    partial_rollouts: Literal["continue", "restart", "drop"] = "continue"
    """Unfinished responses when the weights change: continue after their tokens, start again, or drop their prompts.
    Used only with `async_mode: in_flight`."""

    @property
    def is_async(self) -> bool:
        """True if generation runs ahead of training."""
        return self.async_generation_ratio > 0

    @property
    def updates_in_flight(self) -> bool:
        """True if weights change while responses are being sampled."""
        return self.is_async and self.async_mode == "in_flight"

    @property
    def versions_in_flight(self) -> int:
        """Largest number of versions of the weights whose responses are being sampled at the same time."""
        return 1 + (self.async_generation_ratio if self.updates_in_flight else 0)

    def broken_rules(self) -> Iterator[Problem]:
        """Yield keys that have no effect."""
        yield from super().broken_rules()
        if self.async_mode != "one_step_off" and not self.is_async:
            yield used_only_with("async_mode", "async_generation_ratio", "1 or more")
        if self.partial_rollouts != "continue" and not self.updates_in_flight:
            yield used_only_with("partial_rollouts", "async_mode", "in_flight")
