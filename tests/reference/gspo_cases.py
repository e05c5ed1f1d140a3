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
    rollout: Tensor | None = None
    weights: Tensor | None = None
    policy_mask: Tensor | None = None
    quartiles: Tensor | None = None

    def batch(self) -> TrainBatch:
        rows = torch.arange(len(self.mask))
        rollout = self.old if self.rollout is None else self.rollout
        return TrainBatch(
            *(sequences_of(self.mask), rows, self.advantages, self.old, rollout, self.ref),
            sample_weights=self.weights,
            policy_mask=self.policy_mask,
            length_quartiles=self.quartiles,
        )

    def tables(self) -> tuple[list[list[float]], ...]:
        """log_probs, old, advantages and mask as lists of rows."""
        return tuple(t.tolist() for t in (self.log_probs, self.old, self.advantages, self.mask))


def random_case(
    seed: int,
    batch: int = 5,
    width: int = 7,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float64,
    constant_advantages: bool = False,
    gaps: bool = False,
    weighted: bool = False,
) -> Case:
    """Right-padded responses of random length; one of them empty, one of a single token.

    With `gaps`, masks of several turns: some tokens inside a response are masked as well. With `weighted`, engine
    log-probabilities that differ from the old ones, and sample weights.
    """
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
    case = Case(old + spread * normal(), old, advantages, mask, old + 0.5 * normal())
    if gaps:
        case.mask = mask & (torch.rand(batch, width, generator=generator) < 0.7)
        case.mask[0, -1] = True
    if weighted:
        case.rollout = old + 0.3 * normal()
        case.weights = normal()[:, 0].abs() + 0.1
    return case
