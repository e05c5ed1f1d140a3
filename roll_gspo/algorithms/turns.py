"""Turns of episodes: their rewards and returns, the turns that each is compared with, and their tokens.

Legend: B samples of the rollout, T response positions, N turns of all samples, W tokens of the longest turn. r_it is
the reward of turn t of sample i. A response that is no episode has one turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from roll_gspo.algorithms.discounted import discounted_returns


@dataclass(frozen=True)
class Turns:
    """The turns of a rollout, in the order of the samples and of time.

    Attributes:
        rewards: [N] reward of each turn.
        samples: [N] int64, the sample of each turn.
        numbers: [N] int64, the number of each turn within its sample, from 0.
        states: [N] int64, equal for turns of a group that follow the same messages of the environment.
        of_tokens: [B, T] int64, the index of each token's turn; anything where masked.
    """

    rewards: Tensor
    samples: Tensor
    numbers: Tensor
    states: Tensor
    of_tokens: Tensor

    def returns(self, gamma: float) -> Tensor:
        """Return [N] the return `G_it = sum_(s >= t) gamma^(s - t) r_is` of each turn."""
        table = self.rewards.new_zeros(len(self.of_tokens), int(self.numbers.max()) + 1 if len(self.numbers) else 0)
        present = torch.zeros_like(table, dtype=torch.bool)
        table[self.samples, self.numbers] = self.rewards
        present[self.samples, self.numbers] = True
        return discounted_returns(table, present, gamma)[self.samples, self.numbers]

    def discounted_sums(self, gamma: float) -> Tensor:
        """Return [B] the discounted sum `G_i0 = sum_t gamma^t r_it` of each sample."""
        return self.returns(gamma)[self.numbers == 0]

    def groups(self, group_ids: Tensor, baseline: str) -> Tensor:
        """Return [N] int64, equal for turns that are compared with each other.

        Args:
            group_ids: [B] integers; samples of one prompt share one.
            baseline: `turn` compares the turns of a group with the same number, `group` all its turns, and `state`
                those that follow the same messages.
        """
        groups = group_ids[self.samples]
        if baseline == "group":
            return groups
        second = self.numbers if baseline == "turn" else self.states
        return torch.stack([groups, second]).unique(dim=1, return_inverse=True)[1]

    def tokens(self, response_mask: Tensor) -> TurnTokens:
        """Return the valid tokens of every turn; `response_mask` is [B, T] bool."""
        places = response_mask.nonzero(as_tuple=True)
        owners = self.of_tokens[places]
        counts = torch.bincount(owners, minlength=len(self.rewards))
        slots = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
        return TurnTokens(places, owners, slots, counts)


@dataclass(frozen=True)
class TurnTokens:
    """The valid tokens of every turn, one row per turn: turn n is row n of [N, W].

    Attributes:
        places: (sample, response position) of each valid token.
        owners: the turn of each of these tokens, ascending.
        slots: the number of each token within its turn.
        counts: [N] int64 valid tokens per turn.
    """

    places: tuple[Tensor, ...]
    owners: Tensor
    slots: Tensor
    counts: Tensor

    @cached_property
    def mask(self) -> Tensor:
        """[N, W] bool, true on the tokens of each turn."""
        return torch.arange(int(self.counts.max()) if len(self.counts) else 0) < self.counts[:, None]

    def spread(self, of_turns: Tensor, shape: torch.Size) -> Tensor:
        """Return [B, T] of `shape`: the values [N, W] of the turns at the places of their tokens, 0 elsewhere."""
        result = of_turns.new_zeros(shape)
        result[self.places] = of_turns.expand(self.mask.shape)[self.owners, self.slots]
        return result

    def at_ends(self, of_turns: Tensor, shape: torch.Size) -> Tensor:
        """Return [B, T] of `shape`: the value [N] of each turn at its last valid token, 0 elsewhere."""
        result = of_turns.new_zeros(shape)
        ends = (self.counts.cumsum(0) - 1)[self.counts > 0]
        result[self.places[0][ends], self.places[1][ends]] = of_turns[self.counts > 0]
        return result
