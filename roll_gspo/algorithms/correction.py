"""How far the trainer's log-probabilities are from those that the generation engine sampled with."""

from __future__ import annotations

import torch
from torch import Tensor

from roll_gspo.algorithms.kl import k3
from roll_gspo.algorithms.masking import masked_difference
from roll_gspo.algorithms.ratio import MAX_LOG_RATIO
from roll_gspo.metrics import Metric, mean_of


@torch.no_grad()
def mismatch_metrics(old_log_probs: Tensor, rollout_log_probs: Tensor, response_mask: Tensor) -> dict[str, Metric]:
    """Figures of `d = old_log_probs - rollout_log_probs` (trainer minus engine), all inputs [B, T].

    * `mismatch/log_prob_diff_mean`, `_max`: `|d|` over the valid tokens.
    * `mismatch/kl`: KL(rollout || trainer) per valid token by k3 (`exp(d) - 1 - d`), as the engine sampled.
    * `mismatch/ess`: effective sample size over the number of samples with a response,
      `(sum_i w_i)^2 / sum_i w_i^2 / B`, with the sequence weights `w_i = exp(sum_t d_it)`, the exponent
      clamped to +-20: 1 where both agree, 1/B where one sample outweighs all others. Compute it on a whole
      rollout: merged figures are the mean of those of the pieces.
    """
    difference = masked_difference(old_log_probs, rollout_log_probs, response_mask)
    present = response_mask.any(-1)
    exponents = difference.double().sum(-1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weights = torch.where(present, exponents.exp(), torch.zeros_like(exponents))
    squares = weights.square().sum()
    # All weights are 0 only without any sample; then the figure is a mean over nothing.
    effective = weights.sum().square() / torch.where(squares > 0, squares, torch.ones_like(squares))
    one = difference.new_ones(())
    return {
        "mismatch/log_prob_diff_mean": mean_of(difference.abs(), response_mask),
        "mismatch/log_prob_diff_max": Metric(difference.abs().max(), one, "max"),
        "mismatch/kl": mean_of(k3(-difference), response_mask),
        "mismatch/ess": Metric(effective, present.sum()),
    }
