"""The turns of a rollout's episodes, with the reward of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roll_gspo.algorithms.turns import Turns
from roll_gspo.batch import Completion
from roll_gspo.episode import Episode


def turns_of(completions: Sequence[Completion], scores: Tensor, width: int, format_penalty: float = 0.0) -> Turns:
    """Return the turns of responses.

    A response that is no episode has one turn. What the score of an episode has beyond the rewards of its turns, e.g. a
    penalty of its length, belongs to its last turn.

    Args:
        completions: the responses.
        scores: [B] of the responses.
        width: T, the number of response positions.
        format_penalty: added to the reward of every invalid turn.
    """
    rewards, samples, numbers, states, of_tokens = [], [], [], [], []
    known: dict[str, int] = {}
    positions = torch.arange(width)
    for sample, (completion, score) in enumerate(zip(completions, scores.tolist(), strict=True)):
        episode = completion.episode
        ends = (len(completion.token_ids),) if episode is None or not episode.turns else episode.turn_ends
        own = _rewards(episode, len(ends), score, format_penalty)
        of_tokens.append(len(rewards) + torch.bucketize(positions, torch.tensor(ends[:-1]), right=True))
        rewards += own
        samples += [sample] * len(own)
        numbers += range(len(own))
        states += [known.setdefault(state, len(known)) for state in _states(episode, len(own))]
    return Turns(
        torch.tensor(rewards, dtype=scores.dtype),
        torch.tensor(samples, dtype=torch.int64),
        torch.tensor(numbers, dtype=torch.int64),
        torch.tensor(states, dtype=torch.int64),
        torch.stack(of_tokens) if of_tokens else torch.zeros(0, width, dtype=torch.int64),
    )


def _rewards(episode: Episode | None, count: int, score: float, format_penalty: float) -> list[float]:
    """Return the reward of each of `count` turns; they add up to the score."""
    turns = () if episode is None else episode.turns[: count - 1]
    earlier = [turn.reward + format_penalty * turn.invalid for turn in turns]
    return [*earlier, score - sum(earlier)]


def _states(episode: Episode | None, count: int) -> list[str]:
    """Return a text per turn: the messages that came before it, without the conversation before these."""
    earlier = () if episode is None else episode.turns[: count - 1]
    return ["", *(_text(turn.messages) for turn in earlier)]


def _text(messages: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([dict(message) for message in messages], sort_keys=True, default=str)
