"""The clipped surrogate and its dual clip, per token; all tensors [B, T] and finite where masked."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """`-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)` (GSPO eq. 5; eq. 13 with `seq_token`).

    Returns:
        The loss [B, T], and [B, T] bool: true where the clip takes the gradient away (`surr2 < surr1`).
    """
    surr1 = ratio * advantages
    surr2 = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(surr1, surr2), surr2.detach() < surr1.detach()


def dual_clip(loss: Tensor, advantages: Tensor, dual_clip_ratio: float) -> tuple[Tensor, Tensor]:
    """`min(loss, c |A|)` where `A < 0`, with `c = dual_clip_ratio` > 1 (arXiv 1912.09729).

    Returns:
        The loss [B, T], and [B, T] bool: true where the bound replaced it.
    """
    bound = -dual_clip_ratio * advantages
    bounded = (advantages < 0) & (loss.detach() > bound)
    return torch.where(bounded, bound, loss), bounded
