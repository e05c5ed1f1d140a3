"""Assignment of samples to micro-batches and to data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from roll_gspo.batch import TrainBatch

PartT = TypeVar("PartT")


def split_samples(lengths: Tensor, size: int, max_tokens: int | None = None, packed: bool = False) -> list[Tensor]:
    """Return the sample indices of each micro-batch. Samples of similar length share one, which minimises padding.

    Args:
        lengths: [B] tokens of each sample.
        size: samples per micro-batch if `max_tokens` is None.
        max_tokens: limit per micro-batch, padding included; a longer sample forms a micro-batch alone.
        packed: samples are packed, so there is no padding.
    """
    order = lengths.argsort(stable=True)
    if max_tokens is None:
        return list(order.split(size))
    parts: list[list[int]] = []
    tokens = 0
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        count = len(parts[-1]) if parts else 0
        # sorted: the new sample is the longest, and all are padded to it
        needed = tokens + length if packed else (count + 1) * length
        if not parts or needed > max_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(index)
        tokens += length
    return [torch.tensor(part) for part in parts]


@dataclass(frozen=True)
class MicroBatching:
    """Split of a mini-batch into forward and backward passes. It does not change results.

    Attributes:
        size: samples per pass.
        max_tokens: tokens per pass, instead of `size` (dynamic batching). Samples of similar length share a pass.
        packed: the engine packs samples, so padding does not count.
    """

    size: int
    max_tokens: int | None = None
    packed: bool = False

    def split(self, mini_batch: TrainBatch) -> list[TrainBatch]:
        """Return the micro-batches."""
        if self.max_tokens is None:
            return mini_batch.split(self.size)
        parts = split_samples(mini_batch.sequences.lengths, self.size, self.max_tokens, self.packed)
        return [mini_batch.rows(index) for index in parts]


def share_of_rank(parts: Sequence[PartT], rank: int, world_size: int, multiple_of: int = 1) -> list[PartT | None]:
    """Return the share of `parts` of one of `world_size` ranks, padded with None to the same length on all ranks.

    Args:
        parts: items to distribute.
        rank: rank whose share is returned.
        world_size: number of ranks.
        multiple_of: the number of parts per rank is a multiple of this.
    """
    count = -(-len(parts) // world_size)
    count = -(-count // multiple_of) * multiple_of
    mine: list[PartT | None] = list(parts[rank::world_size])
    return mine + [None] * (count - len(mine))
