"""The policy loss of a micro-batch: ratio, clipped objective, aggregation, KL and entropy terms, metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.aggregate import LOSS_AGG_MODES, Denominators, aggregate
from roll_gspo.algorithms.choice import choose
from roll_gspo.algorithms.kl import KL_ESTIMATORS, k3, kl_estimate
from roll_gspo.algorithms.masking import masked_difference, zero_masked
from roll_gspo.algorithms.objective import clipped_objective, dual_clip
from roll_gspo.algorithms.ratio import RATIOS, importance_ratio
from roll_gspo.batch import TrainBatch
from roll_gspo.metrics import Metric, mean_of


@dataclass(frozen=True)
class PolicyLossSettings:
    """The choices of the policy loss.

    Attributes:
        importance_sampling: a name in `RATIOS`.
        clip_low, clip_high: the ratio is clipped to `[1 - clip_low, 1 + clip_high]`.
        dual_clip_ratio: bound `c` > 1 of the dual clip, or None without one.
        loss_agg_mode: a name in `LOSS_AGG_MODES`.
        response_length: the longest response the run allows, in tokens.
        kl_loss_coef: of the KL term; 0 is without.
        kl_loss_type: a name in `KL_ESTIMATORS`.
        entropy_loss_coef: of the entropy bonus; 0 is without.

    Raises:
        ValueError: a name is unknown or a number is out of range.
    """

    importance_sampling: str
    clip_low: float
    clip_high: float
    dual_clip_ratio: float | None
    loss_agg_mode: str
    response_length: int
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "k3"
    entropy_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        choose(RATIOS, "importance_sampling", self.importance_sampling)
        choose(LOSS_AGG_MODES, "loss_agg_mode", self.loss_agg_mode)
        choose(KL_ESTIMATORS, "kl_loss_type", self.kl_loss_type)
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(f"clip range {self.clip_low}, {self.clip_high}: negative; use 0 or more")
        if self.dual_clip_ratio is not None and self.dual_clip_ratio <= 1:
            raise ValueError(f"dual_clip_ratio: {self.dual_clip_ratio} is not above 1; use e.g. 3.0")
        if self.response_length < 1:
            raise ValueError(f"response_length: {self.response_length} is below 1; give the limit in tokens")


def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    batch: TrainBatch,
    denominators: Denominators,
    settings: PolicyLossSettings,
) -> tuple[Tensor, dict[str, Metric]]:
    """This micro-batch's share of `pg_loss + kl_loss_coef kl - entropy_loss_coef entropy`, and its metrics.

    Shares of the micro-batches of a mini-batch add up to its loss. Half precision is computed in float32.

    Args:
        log_probs: [B, T] of the current policy, with gradient.
        entropy: [B, T] of the current policy's token distributions, or None.
        batch: the samples; masked positions may hold anything.
        denominators: of the whole mini-batch.
        settings: the choices.

    Returns:
        The scalar loss, and metrics without gradient: `actor/{pg,kl,total}_loss` are shares, the others means
        over valid tokens or sequences, or bounds.

    Raises:
        ValueError: the entropy or the reference log-probabilities that a coefficient needs are missing.
    """
    mask = batch.response_mask
    log_probs = zero_masked(log_probs, mask)
    advantages = zero_masked(batch.advantages, mask).to(log_probs.dtype)
    ratio = importance_ratio(log_probs, batch.old_log_probs, mask, settings.importance_sampling)
    token_loss, clipped = clipped_objective(ratio, advantages, settings.clip_low, settings.clip_high)
    dual_clipped = torch.zeros_like(clipped)
    if settings.dual_clip_ratio is not None:
        token_loss, dual_clipped = dual_clip(token_loss, advantages, settings.dual_clip_ratio)

    def share(token_values: Tensor) -> Tensor:
        return aggregate(token_values, mask, denominators, settings.loss_agg_mode, settings.response_length)

    loss = share(token_loss)
    metrics = {"actor/pg_loss": _share_metric(loss)}
    metrics |= _ratio_metrics(log_probs, ratio, batch)
    metrics |= _clip_metrics(clipped, dual_clipped, advantages, mask)
    if batch.ref_log_probs is not None:
        kl = kl_estimate(log_probs, batch.ref_log_probs, mask, settings.kl_loss_type)
        metrics["actor/kl_ref"] = mean_of(kl, mask)
        if settings.kl_loss_coef:
            kl_share = share(kl)
            metrics["actor/kl_loss"] = _share_metric(kl_share)
            loss = loss + settings.kl_loss_coef * kl_share
    elif settings.kl_loss_coef:
        raise ValueError("kl_loss_coef: the batch has no ref_log_probs; score it with the reference")
    if entropy is not None:
        entropy = zero_masked(entropy, mask)
        metrics["actor/entropy"] = mean_of(entropy, mask)
        if settings.entropy_loss_coef:
            loss = loss - settings.entropy_loss_coef * share(entropy)
    elif settings.entropy_loss_coef:
        raise ValueError("entropy_loss_coef: no entropy given; ask the engine to compute it")
    metrics["actor/total_loss"] = _share_metric(loss)
    return loss, metrics


def _share_metric(share: Tensor) -> Metric:
    return Metric(share.detach(), torch.ones_like(share), "sum")


def _ratio_metrics(log_probs: Tensor, ratio: Tensor, batch: TrainBatch) -> dict[str, Metric]:
    """Means over the valid tokens of ratio, |ratio - 1|, log-prob and k3 of KL(old || current); ratio bounds.

    A micro-batch without a valid token has the bounds -inf / inf, which lose against any other.
    """
    mask, log_probs, ratio = batch.response_mask, log_probs.detach(), ratio.detach()
    one = torch.ones_like(ratio[0, 0])
    highest = torch.where(mask, ratio, -torch.inf).max()
    lowest = torch.where(mask, ratio, torch.inf).min()
    return {
        "actor/ratio_mean": mean_of(ratio, mask),
        "actor/ratio_max": Metric(highest, one, "max"),
        "actor/ratio_min": Metric(lowest, one, "min"),
        "actor/ratio_deviation": mean_of((ratio - 1).abs(), mask),
        "actor/approx_kl": mean_of(k3(masked_difference(batch.old_log_probs, log_probs, mask)), mask),
        "actor/log_prob_mean": mean_of(log_probs, mask),
    }


def _clip_metrics(clipped: Tensor, dual_clipped: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Metric]:
    """Where the clip took the gradient away: per valid token (what the GSPO paper plots) and per sequence.

    A sequence counts once, as soon as one of its tokens is clipped. `high` and `low` are the side on which
    the ratio left the range, and add up to the fraction of tokens. The dual clip is counted per valid token.
    """
    dtype = advantages.dtype
    sequence_clipped = clipped.any(-1)  # never where masked: the ratio is 1 and the advantage 0 there
    return {
        "actor/clip_fraction": mean_of(clipped.to(dtype), mask),
        "actor/clip_fraction_sequence": mean_of(sequence_clipped.to(dtype), mask.any(-1)),
        "actor/clip_fraction_high": mean_of((clipped & (advantages > 0)).to(dtype), mask),
        "actor/clip_fraction_low": mean_of((clipped & (advantages < 0)).to(dtype), mask),
        "actor/dual_clip_fraction": mean_of(dual_clipped.to(dtype), mask),
    }
