"""Batches for the algorithm tests: from tables, and random ones with ragged masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch


def sequences_of(response_mask: Tensor) -> Sequences:
    """Prompts of two tokens in front of responses with this mask; token ids play no part in the loss."""
    batch, width = response_mask.shape
    return Sequences(torch.zeros(batch, width + 2, dtype=torch.int64), torch.full((batch,), 2), response_mask)


@dataclass
class Case:
    """[B, T] tensors of one mini-batch."""

    log_probs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    ref: Tensor

    def batch(self) -> TrainBatch:
        rows = torch.arange(len(self.mask))
        return TrainBatch(sequences_of(self.mask), rows, self.advantages, self.old, self.old, self.ref)


def random_case(
    seed: int,
    batch: int = 5,
    width: int = 7,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float64,
    constant_advantages: bool = False,
) -> Case:
    """Right-padded responses of random length; one of them empty, one of a single token."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(batch, width, generator=generator, dtype=torch.float64).to(dtype)

    lengths = torch.randint(1, width + 1, (batch,), generator=generator)
    lengths[0], lengths[-1] = width, 1
    if batch > 3:
        lengths[1] = 0
    mask = torch.arange(width) < lengths[:, None]
    old = -normal().abs() - 0.1
    advantages = normal()
    if constant_advantages:
        advantages = advantages[:, :1].expand(batch, width).clone()
    return Case(old + spread * normal(), old, advantages, mask, old + 0.5 * normal())
