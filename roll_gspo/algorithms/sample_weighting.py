"""Which samples of a rollout the loss sees, how much each counts, and what a too long one costs.

Legend: B samples of the rollout. Everything is decided on the whole rollout, so nothing depends on how it is split
into mini- and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.reward_norm import group_moments


@dataclass(frozen=True)
class SampleMaskSettings:
    """Which samples are taken out of the loss after scoring. They still count in the moments of their group.

    Attributes:
        max_len_mask: take out samples that were cut off at the length limit.
        difficulty_mask: take out groups whose mean score is not strictly between the two thresholds.
        difficulty_low_threshold, difficulty_high_threshold: in units of the score.

    Raises:
        ValueError: the thresholds leave nothing between them.
    """

    max_len_mask: bool = False
    difficulty_mask: bool = False
    difficulty_low_threshold: float = 0.0
    difficulty_high_threshold: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.difficulty_low_threshold, self.difficulty_high_threshold
        if not low < high:
            raise ValueError(f"difficulty_low_threshold: {low} is not below difficulty_high_threshold {high}; lower it")


def kept_samples(scores: Tensor, group_ids: Tensor, truncated: Tensor, settings: SampleMaskSettings) -> Tensor:
    """[B] bool: the loss sees this sample.

    Args:
        scores: [B] of the reward workers.
        group_ids: [B] integers; samples of one prompt share one.
        truncated: [B] bool, generation ended at the length limit (by finish reason, not by length).
        settings: the choices. Groups of one have no difficulty and stay.
    """
    kept = torch.ones_like(truncated, dtype=torch.bool)
    if settings.max_len_mask:
        kept &= ~truncated
    if settings.difficulty_mask:
        means = group_moments(scores.double(), group_ids, None).mean
        _, index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
        inside = (means > settings.difficulty_low_threshold) & (means < settings.difficulty_high_threshold)
        kept &= inside | (sizes[index] == 1)
    return kept


def comparable_samples(valid: Tensor, group_ids: Tensor) -> Tensor:
    """[B] bool: valid samples that are not the only one left of their group.

    Args:
        valid: [B] bool, the sample has a score.
        group_ids: [B] integers; a group that had one sample from the start has lost nothing.
    """
    ids, index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    left = torch.zeros(len(ids), dtype=torch.int64).index_add(0, index, valid.long())
    return valid & (left >= sizes.clamp(max=2))[index]


def sample_weights(
    lengths: Tensor, difficulty: Tensor | None, kept: Tensor, *, length_loss_weight: bool, difficulty_loss_weight: bool
) -> Tensor:
    """[B] float32 factors of the samples' losses with mean 1 over the kept samples of the rollout; 0 for the others.

    The product, scaled to that mean, of `1.5 - (n_i - min) / (max - min)` over the kept samples' lengths (from 1.5 for
    the shortest to 0.5 for the longest) and of `0.5 + 1.5 clip(difficulty, 0, 1)` (from 0.5 to 2): ROLL's weights,
    which it scales per micro-batch.

    Args:
        lengths: [B] valid tokens of each response.
        difficulty: [B] of each prompt, 0 easy to 1 hard; None without.
        kept: [B] bool, what the loss sees.
        length_loss_weight, difficulty_loss_weight: which of the two factors apply.

    Raises:
        ValueError: `difficulty_loss_weight` without difficulties, or one of a kept sample is not finite.
    """
    weights = kept.double()
    if not bool(kept.any()):
        return weights.float()
    if length_loss_weight:
        tokens = lengths.double()
        shortest, longest = tokens[kept].min(), tokens[kept].max()
        weights = weights * (1.5 - (tokens - shortest) / (longest - shortest).clamp(min=1))
    if difficulty_loss_weight:
        if difficulty is None or not bool(difficulty[kept].isfinite().all()):
            raise ValueError(
                "difficulty_loss_weight: a prompt has no finite difficulty; give every row of the data one"
            )
        weights = weights * (0.5 + 1.5 * torch.where(kept, difficulty.double(), 0.0).clamp(0, 1))
    return (weights / weights[kept].mean()).float()


def overlong_penalty(
    lengths: Tensor, response_length: int, overlong_buffer_length: int, overlong_penalty_factor: float
) -> Tensor:
    """[B] float32 <= 0, to add to the scores before they are normalised (DAPO, arXiv 2503.14476, eq. 13).

    0 up to `response_length - overlong_buffer_length` tokens, from there linearly down to `-overlong_penalty_factor`
    at `response_length`, and no lower beyond.

    Args:
        lengths: [B] valid tokens of each response.
        response_length: the longest response the run allows.
        overlong_buffer_length: over how many tokens the penalty rises.
        overlong_penalty_factor: the whole penalty, in units of the score.

    Raises:
        ValueError: the buffer is not between 1 and `response_length`, or the factor is negative.
    """
    if not 1 <= overlong_buffer_length <= response_length:
        raise ValueError(
            f"overlong_buffer_length: {overlong_buffer_length} is not between 1 and response_length {response_length}"
        )
    if overlong_penalty_factor < 0:
        raise ValueError(f"overlong_penalty_factor: {overlong_penalty_factor} would be a reward; use 0 or more")
    over = lengths.double() - (response_length - overlong_buffer_length)
    return (-overlong_penalty_factor * (over / overlong_buffer_length).clamp(0, 1)).float()
