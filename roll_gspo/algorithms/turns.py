"""Turns of episodes: their rewards and returns, the turns that each is compared with, and their tokens.

Legend: B samples of the rollout in R rows, T response positions, N turns of all samples, W tokens of the longest turn.
r_it is the reward of turn t of sample i. A response that is no episode has one turn.
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

    def tokens(self, response_mask: Tensor) -> TokenTable:
        """Return the valid tokens of every turn, as rows of a table; `response_mask` is [B, T] bool."""
        rows, columns = response_mask.nonzero(as_tuple=True)
        return TokenTable.of((rows, columns), self.of_tokens[rows, columns], len(self.rewards))


@dataclass(frozen=True)
class TokenTable:
    """A table [N, W] of the valid tokens of [R, T]: row n has those of owner n, a turn or a sample, without gaps.

    Attributes:
        places: (row, column) of each valid token in [R, T].
        owners: the owner of each of these tokens, ascending.
        slots: the number of each token among those of its owner.
        counts: [N] int64 tokens per owner.
    """

    places: tuple[Tensor, Tensor]
    owners: Tensor
    slots: Tensor
    counts: Tensor

    @staticmethod
    def of(places: tuple[Tensor, Tensor], owners: Tensor, count: int) -> TokenTable:
        """Return the table of `count` owners; `owners` are ascending."""
        counts = torch.bincount(owners, minlength=count)
        slots = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
        return TokenTable(places, owners, slots, counts)

    @cached_property
    def mask(self) -> Tensor:
        """[N, W] bool, true on the tokens of each owner."""
        return torch.arange(int(self.counts.max()) if len(self.counts) else 0) < self.counts[:, None]

    def gather(self, values: Tensor) -> Tensor:
        """Return [N, W]: the values [R, T] of the tokens of each owner, 0 elsewhere."""
        result = values.new_zeros(self.mask.shape)
        result[self.owners, self.slots] = values[self.places]
        return result

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Return [R, T] of `shape`: the values [N, W] at the places of the tokens, 0 elsewhere."""
        result = values.new_zeros(shape)
        result[self.places] = values.expand(self.mask.shape)[self.owners, self.slots]
        return result

    def at_ends(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Return [R, T] of `shape`: the value [N] of each owner at its last token, 0 elsewhere."""
        result = values.new_zeros(shape)
        ends = (self.counts.cumsum(0) - 1)[self.counts > 0]
        result[self.places[0][ends], self.places[1][ends]] = values[self.counts > 0]
        return result


def joined_rows(response_mask: Tensor, samples: Tensor, order: Tensor) -> TokenTable:
    """Return the valid tokens of every sample, as rows of a table.

    Args:
        response_mask: [R, T] bool.
        samples: [R] int64, the sample of each row; every sample from 0 has a row.
        order: [R] int64, the rows by sample, and those of a sample by time.
    """
    rows, columns = response_mask[order].nonzero(as_tuple=True)
    rows = order[rows]
    return TokenTable.of((rows, columns), samples[rows], int(samples.max()) + 1 if len(samples) else 0)
