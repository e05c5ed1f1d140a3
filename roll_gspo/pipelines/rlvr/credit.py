"""The turns of a rollout's episodes, with the reward of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from roll_gspo.algorithms.turns import Turns
from roll_gspo.batch import Completion
from roll_gspo.episode import Episode, EpisodeBranch


def turns_of(completions: Sequence[Completion], scores: Tensor) -> Turns:
    """Return the turns of responses, of whose tokens only those count that were sampled.

    A response that is no episode has one turn. The turns of other conversations of an episode come before those of its
    own. What the score has beyond the rewards of the turns, e.g. a penalty of the length, belongs to the last turn.

    Args:
        completions: the responses.
        scores: [B] of the responses.
    """
    rewards, samples, numbers, states, lengths = [], [], [], [], []
    known: dict[str, int] = {}
    for sample, (completion, score) in enumerate(zip(completions, scores.tolist(), strict=True)):
        turns = [turn for one in _conversations(completion) for turn in _turns(one)]
        turns = turns or [_Turn(0.0, "", completion.num_sampled)]
        rewards += [turn.reward for turn in turns[:-1]]
        rewards.append(score - sum(turn.reward for turn in turns[:-1]))
        samples += [sample] * len(turns)
        numbers += range(len(turns))
        states += [known.setdefault(turn.state, len(known)) for turn in turns]
        lengths += [turn.num_sampled for turn in turns]
    return Turns(
        torch.tensor(rewards, dtype=scores.dtype),
        torch.tensor(samples, dtype=torch.int64),
        torch.tensor(numbers, dtype=torch.int64),
        torch.tensor(states, dtype=torch.int64),
        _of_tokens(len(completions), samples, lengths),
    )


class _Turn(NamedTuple):
    """A turn: its reward, a text that is equal for turns that follow the same messages, and its sampled tokens."""

    reward: float
    state: str
    num_sampled: int


def _conversations(completion: Completion) -> Sequence[Episode | EpisodeBranch]:
    episode = completion.episode
    return () if episode is None else (*episode.branches, episode)


def _turns(conversation: Episode | EpisodeBranch) -> list[_Turn]:
    starts = (0, *conversation.turn_ends)
    turns, state = [], str(conversation.prompt_ids)
    for turn, start, end in zip(conversation.turns, starts, conversation.turn_ends, strict=False):
        turns.append(_Turn(turn.reward, state, sum(conversation.mask[start:end])))
        state = json.dumps([dict(message) for message in turn.messages], sort_keys=True, default=str)
    return turns


def _of_tokens(count: int, samples: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return [B, W], the turn of each sampled token of each sample, from the sample and the length of each turn."""
    turns: list[list[int]] = [[] for _ in range(count)]
    for number, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        turns[sample] += [number] * length
    table = torch.zeros(count, max(map(len, turns), default=0), dtype=torch.int64)
    for row, of_tokens in enumerate(turns):
        table[row, : len(of_tokens)] = torch.tensor(of_tokens, dtype=torch.int64)
    return table
