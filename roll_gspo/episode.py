"""The turns of a response that is an episode: what the model answered and what its environment returned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EpisodeTurn:
    """One answer of the model in an episode of several turns, and what its environment returned.

    Attributes:
        answer: the sampled text, without the token that ends the turn.
        messages: the messages that the environment returned.
        reward: reward of the turn.
        invalid: True if the environment could not understand the answer.
        metrics: numbers that the environment reports.
    """

    answer: str
    messages: tuple[Mapping[str, Any], ...] = ()
    reward: float = 0.0
    invalid: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Episode:
    """The turns of a response, and why it ended.

    Attributes:
        prompt_ids: the first prompt, which the environment made.
        mask: for each token of the response, True if the model sampled it and False if it was given.
        turn_ends: number of response tokens at the end of each answer.
        turns: the conversation after the first prompt.
        end: why the episode ended: `done`, `max_turns`, `max_tokens`, `timeout` or `failed`.
        failed: why the environment failed, or None. A failed episode has no reward.
        traceback: the frames of the environment in which it raised; empty if it did not raise.
        num_rewritten: number of turns before which the chat template would have changed the recorded history.
    """

    prompt_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    turn_ends: tuple[int, ...]
    turns: tuple[EpisodeTurn, ...]
    end: str
    failed: str | None = None
    traceback: str = ""
    num_rewritten: int = 0

    @property
    def reward(self) -> float:
        """Sum of the rewards of all turns."""
        return sum(turn.reward for turn in self.turns)
