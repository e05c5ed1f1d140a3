"""Sample and token masks, sample weights, length quartiles and the penalty of overlong responses.

Legend: B samples of the rollout. All are computed on the whole rollout, so that they do not depend on its split into
mini- and micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.reward_norm import group_moments


@dataclass(frozen=True)
class SampleMaskSettings:
    """Settings of the sample masks. Masked samples leave the loss, but still count in the moments of their group.

    Attributes:
        max_len_mask: mask samples that were truncated at the length limit.
        difficulty_mask: mask groups whose mean score is not strictly between the two thresholds.
        difficulty_low_threshold, difficulty_high_threshold: in units of the score.
    """

    max_len_mask: bool = False
    difficulty_mask: bool = False
    difficulty_low_threshold: float = 0.0
    difficulty_high_threshold: float = 1.0


def kept_samples(scores: Tensor, group_ids: Tensor, truncated: Tensor, settings: SampleMaskSettings) -> Tensor:
    """Return [B] bool: true if the sample is in the loss.

    Args:
        scores: [B] from the reward workers.
        group_ids: [B] integers; samples of one prompt share one.
        truncated: [B] bool, generation ended at the length limit (by finish reason, not by length).
        settings: of the masks. The difficulty mask does not apply to groups of one.
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
    """Return [B] bool: valid samples, except a single one left of a larger group.

    Args:
        valid: [B] bool, the sample has a score.
        group_ids: [B] integers; a group of one sample is kept.
    """
    ids, index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    left = torch.zeros(len(ids), dtype=torch.int64).index_add(0, index, valid.long())
    return valid & (left >= sizes.clamp(max=2))[index]


def sample_weights(
    lengths: Tensor, difficulty: Tensor | None, kept: Tensor, *, length_loss_weight: bool, difficulty_loss_weight: bool
) -> Tensor:
    """Return [B] float32 factors of the sample losses: mean 1 over the kept samples of the rollout, 0 for the others.

    The product of `1.5 - (n_i - min) / (max - min)` over the lengths of kept samples (from 1.5 for the shortest to 0.5
    for the longest) and of `0.5 + 1.5 clip(difficulty, 0, 1)` (from 0.5 to 2), scaled to mean 1. These are ROLL's
    weights, which ROLL scales per micro-batch.

    Args:
        lengths: [B] valid tokens per response.
        difficulty: [B] of the prompts, 0 easy to 1 hard, or None.
        kept: [B] bool, samples in the loss.
        length_loss_weight, difficulty_loss_weight: switch on the two factors.

    Raises:
        ValueError: `difficulty_loss_weight` is set, and a kept sample has no finite difficulty.
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
    """Return [B] float32 <= 0, to add to the scores before normalisation (DAPO, arXiv 2503.14476, eq. 13).

    It is 0 up to `response_length - overlong_buffer_length` tokens, and falls linearly to `-overlong_penalty_factor` at
    `response_length`. Longer responses get the same penalty.

    Args:
        lengths: [B] valid tokens per response.
        response_length: maximum response length in tokens.
        overlong_buffer_length: tokens over which the penalty grows.
        overlong_penalty_factor: maximum penalty in units of the score, 0 or more.
    """
    over = lengths.double() - (response_length - overlong_buffer_length)
    return (-overlong_penalty_factor * (over / overlong_buffer_length).clamp(0, 1)).float()


def top_entropy_tokens(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Return [B, T] bool: the fraction `quantile` of the tokens in `mask` with the highest entropy.

    High-entropy tokens decide how the response goes on (arXiv 2506.01939, eq. 6). Tokens as high as the lowest one that
    is kept are kept too.

    Args:
        entropy: [B, T] of the policy's token distributions, anything where masked.
        mask: [B, T] bool of the whole rollout.
        quantile: above 0, at most 1.
    """
    values = entropy[mask]
    if not len(values):
        return mask
    count = max(math.ceil(quantile * len(values) - 1e-9), 1)  # 0.07 * 100 is above 7
    threshold = values.sort(descending=True).values[count - 1]
    return mask & (torch.where(mask, entropy, -math.inf) >= threshold)


def length_quartiles(lengths: Tensor) -> Tensor:
    """Return [B] int64, 0 to 3: the quartile of each response among the lengths [B] above 0 of the rollout.

    Equally long responses are in the same quartile. Responses without a token are in the first.
    """
    present = lengths[lengths > 0].sort().values
    if not len(present):
        return torch.zeros_like(lengths)
    bounds = torch.stack([present[math.ceil(len(present) * k / 4) - 1] for k in (1, 2, 3)])
    return (lengths[:, None] > bounds).sum(-1)
