"""Importance ratios between the current and the old policy: `importance_sampling`.

Every function maps `(log_probs, old_log_probs, response_mask)`, all [B, T], to a ratio [B, T] that is 1 where
masked. `d_it = log_probs_it - old_log_probs_it` is clamped to +-20 before any `exp`; a token beyond the clamp
carries no gradient. A sample without valid tokens has ratio 1.
Equation numbers are those of the GSPO paper, arXiv 2507.18071.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from roll_gspo.algorithms.choice import choose
from roll_gspo.algorithms.masking import masked_difference

MAX_LOG_RATIO = 20.0

RatioFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def clamped_log_ratio(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """`d_it` [B, T] in +-20, exactly 0 where masked."""
    return masked_difference(log_probs, old_log_probs, response_mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_ratio(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """`r_it = exp(d_it)`: PPO and GRPO (eq. 3)."""
    return clamped_log_ratio(log_probs, old_log_probs, response_mask).exp()


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """`s_i = exp(sum_t m_it d_it / n_i)` (GSPO, eq. 7), repeated on every valid token of sample i."""
    log_ratio_BT = clamped_log_ratio(log_probs, old_log_probs, response_mask)
    log_ratio_B = log_ratio_BT.sum(-1, keepdim=True) / response_mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(response_mask, log_ratio_B.exp(), torch.ones_like(log_ratio_BT))


def sequence_token_ratio(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """`s_it = sg[s_i] exp(log_probs_it - sg[log_probs_it])`: GSPO-token (eq. 14).

    Numerically `s_i`; the gradient goes through the token alone, so advantages may differ within a sample.
    """
    log_ratio_BT = clamped_log_ratio(log_probs, old_log_probs, response_mask)
    sequence = sequence_ratio(log_probs, old_log_probs, response_mask).detach()
    # The clamped difference stands for log_probs: the same gradient, and none beyond the clamp, as in `seq`.
    return sequence * (log_ratio_BT - log_ratio_BT.detach()).exp()


RATIOS: Mapping[str, RatioFunction] = {
    "token": token_ratio,
    "seq": sequence_ratio,
    "seq_token": sequence_token_ratio,
}


def importance_ratio(
    log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor, importance_sampling: str
) -> Tensor:
    """The ratio [B, T] at the level that `importance_sampling` names.

    Raises:
        ValueError: `importance_sampling` is not in `RATIOS`.
    """
    ratio = choose(RATIOS, "importance_sampling", importance_sampling)
    return ratio(log_probs, old_log_probs, response_mask)
