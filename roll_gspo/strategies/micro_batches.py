"""Assignment of samples to micro-batches and to data-parallel ranks.

Every rank computes the same assignment. It changes no result but the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.models.pass_cost import PassCost

PartT = TypeVar("PartT")
SWAPPED_PARTS = 8  # parts per rank up to which swaps are tried; more parts are balanced without


def costs_of(sequences: Sequences, cost: PassCost) -> Tensor:
    """Return [B] int64, the estimated operations of a pass over each sample."""
    return _costs(sequences.lengths, sequences.response_mask.sum(-1), cost)


def cost_of_pass(sequences: Sequences, cost: PassCost, packed: bool, index: Tensor | None = None) -> int:
    """Return the estimated operations of a pass over the samples of `index` (all by default), padding included."""
    lengths, predicted = sequences.lengths, sequences.response_mask.sum(-1)
    if index is not None:
        lengths, predicted = lengths[index], predicted[index]
    return int(_costs(lengths if packed else lengths.amax().expand_as(lengths), predicted, cost).sum())


def _costs(lengths: Tensor, predicted: Tensor, cost: PassCost) -> Tensor:
    costs = cost.per_token * lengths + cost.per_pair * lengths**2 + cost.per_prediction * predicted
    if cost.window is None:
        return costs
    seen = lengths.clamp(max=cost.window)
    return costs + cost.per_windowed_pair * seen * (2 * lengths - seen)


def split_samples(
    lengths: Tensor,
    size: int,
    max_tokens: int | None = None,
    packed: bool = False,
    *,
    ranks: int = 1,
    costs: Tensor | None = None,
) -> list[Tensor]:
    """Return the sample indices of each micro-batch. Samples of similar length share one, which minimises padding.

    For several data-parallel ranks, the number of micro-batches is a multiple of the ranks if there are enough samples.
    Packed micro-batches then have similar costs per rank, instead of samples of similar length.

    Args:
        lengths: [B] tokens of each sample.
        size: samples per micro-batch if `max_tokens` is None.
        max_tokens: limit per micro-batch, padding included; a longer sample forms a micro-batch alone.
        packed: samples are packed, so there is no padding.
        ranks: data-parallel ranks that share the micro-batches.
        costs: [B] cost of each sample; its length by default.
    """
    order = lengths.argsort(stable=True)
    if max_tokens is None:
        return list(order.split(size))
    samples = list(zip(order.tolist(), lengths[order].tolist(), strict=True))
    parts = _filled(samples, max_tokens, packed)
    if ranks > 1:
        passes = -(-len(parts) // ranks)
        known = (lengths if costs is None else costs).tolist()
        # one more pass per rank leaves room if samples hardly fit
        spread = (_spread(samples, known, ranks, count, max_tokens) for count in (passes, passes + 1) if packed)
        found = next((found for found in spread if found is not None), None)
        parts = found or _evenly_filled(samples, passes * ranks, max_tokens, packed)
    return [torch.tensor(part) for part in parts]


def _filled(samples: list[tuple[int, int]], max_tokens: int, packed: bool) -> list[list[int]]:
    """Fill one micro-batch after the other with (index, length) of samples in order of length."""
    parts: list[list[int]] = []
    tokens = 0
    for index, length in samples:
        count = len(parts[-1]) if parts else 0
        # sorted: the new sample is the longest, and all are padded to it
        needed = tokens + length if packed else (count + 1) * length
        if not parts or needed > max_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(index)
        tokens += length
    return parts


def _evenly_filled(samples: list[tuple[int, int]], count: int, max_tokens: int, packed: bool) -> list[list[int]]:
    """Fill at most `count` micro-batches with the smallest limit that suffices, so that the last one is not small."""
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_filled(samples, middle, packed)) <= count:
            high = middle
        else:
            low = middle + 1
    return _filled(samples, low, packed)


def _spread(
    samples: list[tuple[int, int]], costs: list[int], ranks: int, passes: int, max_tokens: int
) -> list[list[int]] | None:
    """Spread samples over ranks of similar cost, and those of a rank over packed passes; None if they do not fit."""
    of_ranks = _balanced(samples, costs, ranks, passes * max_tokens)
    if of_ranks is None:
        return None
    parts = []
    for of_rank in of_ranks:
        of_passes = _balanced(of_rank, costs, passes, max_tokens)
        if of_passes is None:
            return None
        parts += [[index for index, _ in part] for part in of_passes if part]
    return parts


def _balanced(
    samples: list[tuple[int, int]], costs: list[int], count: int, max_tokens: int
) -> list[list[tuple[int, int]]] | None:
    """Distribute (index, length) of samples over `count` bins of similar cost; None if a bin would be too long.

    The most expensive sample left goes to the cheapest bin with room (longest processing time first). A bin with one
    sample may be longer than `max_tokens`.
    """
    cost, tokens = [0] * count, [0] * count
    owner: dict[int, int] = {}
    for index, length in sorted(samples, key=lambda sample: (-costs[sample[0]], sample[0])):
        room = [number for number in range(count) if not tokens[number] or tokens[number] + length <= max_tokens]
        if not room:
            return None
        cheapest = min(room, key=lambda number: (cost[number], number))
        owner[index] = cheapest
        cost[cheapest] += costs[index]
        tokens[cheapest] += length
    bins: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for sample in samples:
        bins[owner[sample[0]]].append(sample)
    return bins


@dataclass(frozen=True)
class MicroBatching:
    """Split of a mini-batch into forward and backward passes. It does not change results.

    Attributes:
        size: samples per pass.
        max_tokens: tokens per pass, instead of `size` (dynamic batching). Samples of similar length share a pass.
        packed: the engine packs samples, so padding does not count.
        ranks: data-parallel ranks that share the passes.
        cost: cost of a pass over a sample, which is balanced over the ranks.
    """

    size: int
    max_tokens: int | None = None
    packed: bool = False
    ranks: int = 1
    cost: PassCost = field(default_factory=PassCost)

    def split(self, mini_batch: TrainBatch) -> list[TrainBatch]:
        """Return the micro-batches."""
        if self.max_tokens is None:
            return mini_batch.split(self.size)
        sequences = mini_batch.sequences
        costs = costs_of(sequences, self.cost) if self.ranks > 1 else None
        limits = self.size, self.max_tokens, self.packed
        parts = split_samples(sequences.lengths, *limits, ranks=self.ranks, costs=costs)
        return [mini_batch.rows(index) for index in parts]


def share_of_rank(
    parts: Sequence[PartT], rank: int, world_size: int, multiple_of: int = 1, costs: Sequence[int] | None = None
) -> list[PartT | None]:
    """Return the share of `parts` of one of `world_size` ranks, padded with None to the same length on all ranks.

    The most expensive part left goes to the rank with the lowest sum that still has a place. Ranks of few parts then
    swap some while that lowers the highest sum. Each rank keeps the order of its parts.

    Args:
        parts: items to distribute.
        rank: rank whose share is returned.
        world_size: number of ranks.
        multiple_of: the number of parts per rank is a multiple of this.
        costs: cost of each part; equal by default.
    """
    count = -(-len(parts) // world_size)
    known = [1] * len(parts) if costs is None else costs
    shares: list[list[int]] = [[] for _ in range(world_size)]
    sums = [0] * world_size
    for number in sorted(range(len(parts)), key=lambda number: (-known[number], number)):
        free = (other for other in range(world_size) if len(shares[other]) < count)
        cheapest = min(free, key=lambda other: (sums[other], other))
        shares[cheapest].append(number)
        sums[cheapest] += known[number]
    while count <= SWAPPED_PARTS and _swap(shares, sums, known):
        pass
    mine: list[PartT | None] = [parts[number] for number in sorted(shares[rank])]
    return mine + [None] * (-(-count // multiple_of) * multiple_of - len(mine))


def _swap(shares: list[list[int]], sums: list[int], costs: Sequence[int]) -> bool:
    """Swap a part of the most expensive rank so that the larger of two sums falls most; return whether one falls."""
    rank = sums.index(max(sums))
    best = (sums[rank], 0, 0, 0)
    for other, share in enumerate(shares):
        for mine in shares[rank]:
            for theirs in share:
                change = costs[mine] - costs[theirs]
                if change > 0:
                    best = min(best, (max(sums[rank] - change, sums[other] + change), other, mine, theirs))
    larger, other, mine, theirs = best
    if larger == sums[rank]:
        return False
    change = costs[mine] - costs[theirs]
    shares[rank][shares[rank].index(mine)], shares[other][shares[other].index(theirs)] = theirs, mine
    sums[rank], sums[other] = sums[rank] - change, sums[other] + change
    return True
