"""The turns of a response that is an episode: what the model answered and what its environment returned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, groupby, repeat
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
class EpisodeBranch:
    """Another conversation of an episode, which shares its reward.

    An agent begins one if it cuts or rewrites the history, or asks the model about something else.

    Attributes:
        prompt_ids: the first prompt. If the branch leaves another one after an answer, it contains the tokens so far.
        token_ids: the response.
        log_probs: log-prob of each token of the response under the sampling distribution; 0 for given tokens.
        mask, turn_ends, turns: as in `Episode`. The turns have no rewards.
        version_runs: as in `Completion`.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    mask: tuple[bool, ...]
    turn_ends: tuple[int, ...]
    turns: tuple[EpisodeTurn, ...]
    version_runs: tuple[tuple[int, int], ...] = ()


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
        prompt_text: text of the first prompt.
        branches: other conversations of the episode, in the order in which they began. Each is another row of tokens
            with the advantage of the episode.
    """

    prompt_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    turn_ends: tuple[int, ...]
    turns: tuple[EpisodeTurn, ...]
    end: str
    failed: str | None = None
    traceback: str = ""
    num_rewritten: int = 0
    prompt_text: str = ""
    branches: tuple[EpisodeBranch, ...] = ()

    @property
    def num_branches(self) -> int:
        """Number of conversations of the episode."""
        return 1 + len(self.branches)

    @property
    def reward(self) -> float:
        """Sum of the rewards of all turns."""
        return sum(turn.reward for turn in self.turns)

    def to_json(self) -> str:
        """Return the episode as JSON. The mask is written as the lengths of its runs, which begin with sampled ones."""
        return json.dumps(_state_of(self) | {"branches": [_state_of(branch) for branch in self.branches]})

    @staticmethod
    def from_json(text: str) -> Episode:
        """Return the episode that `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: the text is no episode.
        """
        state = json.loads(text)
        branches = (EpisodeBranch(**_fields_of(branch)) for branch in state.pop("branches", ()))
        return Episode(**_fields_of(state), branches=tuple(branches))


def _state_of(conversation: Episode | EpisodeBranch) -> dict[str, Any]:
    turns = conversation.turns
    written = [vars(t) | {"messages": [dict(m) for m in t.messages], "metrics": dict(t.metrics)} for t in turns]
    return vars(conversation) | {"mask": _runs_of(conversation.mask), "turns": written}


def _fields_of(state: dict[str, Any]) -> dict[str, Any]:
    turns = (EpisodeTurn(**turn | {"messages": tuple(turn["messages"])}) for turn in state["turns"])
    found = state | {"mask": _mask_of(state["mask"]), "turns": tuple(turns)}
    found |= {name: tuple(found[name]) for name in ("prompt_ids", "turn_ends")}
    if "token_ids" in found:
        found |= {name: tuple(found[name]) for name in ("token_ids", "log_probs")}
        found["version_runs"] = tuple((version, count) for version, count in found["version_runs"])
    return found


def _runs_of(mask: Sequence[bool]) -> list[int]:
    runs = [(value, sum(1 for _ in run)) for value, run in groupby(mask)]
    return [*([0] if runs and not runs[0][0] else []), *(length for _, length in runs)]


def _mask_of(runs: Sequence[int]) -> tuple[bool, ...]:
    return tuple(chain.from_iterable(repeat(value, length) for value, length in zip(cycle((True, False)), runs)))
