"""The mismatch of log-probs between trainer and generation engine: metrics, and importance weights that correct it.

Legend: `d_it = old_log_probs_it - rollout_log_probs_it`, trainer minus engine, with the same model weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.kl import k3
from roll_gspo.algorithms.masking import masked_difference
from roll_gspo.algorithms.ratio import MAX_LOG_RATIO
from roll_gspo.metrics import Metric, mean_of


@torch.no_grad()
def mismatch_metrics(old_log_probs: Tensor, rollout_log_probs: Tensor, response_mask: Tensor) -> dict[str, Metric]:
    """Return metrics of `d = old_log_probs - rollout_log_probs` (trainer minus engine); all inputs are [B, T].

    * `mismatch/log_prob_diff_mean`, `_max`: `|d|` over the valid tokens.
    * `mismatch/kl`: KL(rollout || trainer) per valid token by k3 (`exp(d) - 1 - d`), as the engine sampled.
    * `mismatch/ess`: effective sample size over the number of samples with a response,
      `(sum_i w_i)^2 / sum_i w_i^2 / B`, with the sequence weights `w_i = exp(sum_t d_it)` and the exponent
      clamped to +-20. It is 1 if both agree, and 1/B if one sample outweighs all others. Compute it on a whole
      rollout: merging averages the values of the parts.
    """
    difference = masked_difference(old_log_probs, rollout_log_probs, response_mask)
    present = response_mask.any(-1)
    exponents = difference.double().sum(-1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weights = torch.where(present, exponents.exp(), torch.zeros_like(exponents))
    squares = weights.square().sum()
    # All weights are 0 only if there is no sample; then the weight of the metric is 0.
    effective = weights.sum().square() / torch.where(squares > 0, squares, torch.ones_like(squares))
    one = difference.new_ones(())
    return {
        "mismatch/log_prob_diff_mean": mean_of(difference.abs(), response_mask),
        "mismatch/log_prob_diff_max": Metric(difference.abs().max(), one, "max"),
        "mismatch/kl": mean_of(k3(-difference), response_mask),
        "mismatch/ess": Metric(effective, present.sum()),
    }


@dataclass(frozen=True)
class CorrectionSettings:
    """Settings of `train_infer_correction`: importance weights `pi_trainer / pi_engine` on the loss.

    Attributes:
        level: a name in `CORRECTION_LEVELS`.
        mode: a name in `CORRECTION_MODES`.
        lower_bound, upper_bound: bounds of the weight; 0 is no lower bound.
    """

    level: str
    mode: str
    lower_bound: float = 0.0
    upper_bound: float = 2.0


def token_level(difference: Tensor, lengths: Tensor) -> Tensor:
    """Return [B, T] exponents `d_it`: one weight per token."""
    return difference


def geometric_level(difference: Tensor, lengths: Tensor) -> Tensor:
    """Return [B, 1] exponents `sum_t d_it / n_i`: the mean over the response, on the scale of one token."""
    return difference.sum(-1, keepdim=True) / lengths.clamp(min=1)


def sequence_level(difference: Tensor, lengths: Tensor) -> Tensor:
    """Return [B, 1] exponents `sum_t d_it`: the weight of the whole response, unbiased and of high variance."""
    return difference.sum(-1, keepdim=True)


CORRECTION_LEVELS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": token_level,
    "geometric": geometric_level,
    "sequence": sequence_level,
}


def truncate(weights: Tensor, settings: CorrectionSettings) -> Tensor:
    """`clip(w, lower_bound, upper_bound)`: truncated importance sampling (Ionides 2008; for LLMs Yao et al. 2025)."""
    return weights.clamp(settings.lower_bound, settings.upper_bound)


def mask(weights: Tensor, settings: CorrectionSettings) -> Tensor:
    """`w` within the bounds, else 0: masked importance sampling (IcePop, arXiv 2510.18855, section 2.3.2)."""
    inside = (weights >= settings.lower_bound) & (weights <= settings.upper_bound)
    return torch.where(inside, weights, 0.0)


CORRECTION_MODES: Mapping[str, Callable[[Tensor, CorrectionSettings], Tensor]] = {"truncate": truncate, "mask": mask}


@torch.no_grad()
def correction_weights(
    old_log_probs: Tensor, rollout_log_probs: Tensor, response_mask: Tensor, settings: CorrectionSettings
) -> tuple[Tensor, dict[str, Metric]]:
    """Return factors [B, T] of the token losses, without gradient and 1 where masked; exponents are clamped to +-20.

    The weights do not enter the denominators of the loss, so that it does not depend on the split into micro-batches.

    Returns:
        The weights, and metrics over valid tokens: `correction/weight_mean`, `correction/bounded_fraction` (weights
        that the bounds changed), and `correction/raw_weight_mean` and `_max` of the weights before the bounds.
    """
    difference = masked_difference(old_log_probs, rollout_log_probs, response_mask)
    exponents = CORRECTION_LEVELS[settings.level](difference, response_mask.sum(-1, keepdim=True))
    plain = exponents.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounded = CORRECTION_MODES[settings.mode](plain, settings)
    changed = (bounded != plain).to(plain.dtype).expand_as(difference)
    weights = torch.where(response_mask, bounded, 1.0)
    raw = torch.where(response_mask, plain, 0.0)
    return weights, {
        "correction/raw_weight_mean": mean_of(raw, response_mask),
        "correction/raw_weight_max": Metric(raw.amax(), raw.new_ones(()), "max"),
        "correction/weight_mean": mean_of(weights, response_mask),
        "correction/bounded_fraction": mean_of(changed, response_mask),
    }
