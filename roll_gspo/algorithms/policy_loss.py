"""The policy loss of a micro-batch: ratio, objective, weights, aggregation, KL and entropy terms, metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.aggregate import LOSS_AGG_MODES, Denominators, aggregate_sums
from roll_gspo.algorithms.choice import choose
from roll_gspo.algorithms.correction import CorrectionSettings, correction_weights
from roll_gspo.algorithms.kl import KL_ESTIMATORS, MAX_K3, kl_estimate
from roll_gspo.algorithms.masking import count_true, raised, zero_masked
from roll_gspo.algorithms.objective import (
    FORM_THEIR_OWN_RATIO,
    HAVE_A_CLIP_RANGE,
    POLICY_LOSSES,
    Terms,
    dual_clip,
)
from roll_gspo.algorithms.ratio import RATIOS, clamped_log_ratio, importance_ratio
from roll_gspo.batch import TrainBatch
from roll_gspo.metrics import Metric


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
        policy_loss: a name in `POLICY_LOSSES`; those without a clip range take None for its bounds.
        sapo_tau_positive, sapo_tau_negative: temperatures of `sapo`.
        correction: weights for the mismatch of trainer and generation engine, or None without.

    Raises:
        ValueError: a name is unknown or a number is out of range.
    """

    importance_sampling: str
    clip_low: float | None
    clip_high: float | None
    dual_clip_ratio: float | None
    loss_agg_mode: str
    response_length: int
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "k3"
    entropy_loss_coef: float = 0.0
    policy_loss: str = "clip"
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    correction: CorrectionSettings | None = None

    def __post_init__(self) -> None:
        choose(RATIOS, "importance_sampling", self.importance_sampling)
        choose(LOSS_AGG_MODES, "loss_agg_mode", self.loss_agg_mode)
        choose(KL_ESTIMATORS, "kl_loss_type", self.kl_loss_type)
        choose(POLICY_LOSSES, "policy_loss", self.policy_loss)
        if self.policy_loss in FORM_THEIR_OWN_RATIO and self.importance_sampling != "token":
            raise ValueError(
                f"importance_sampling: policy_loss {self.policy_loss} forms the ratio of the whole response itself; "
                f"set token instead of {self.importance_sampling}"
            )
        for name, bound in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if self.policy_loss in HAVE_A_CLIP_RANGE and (bound is None or bound < 0):
                raise ValueError(f"{name}: policy_loss {self.policy_loss} needs 0 or more, not {bound}")
        if self.dual_clip_ratio is not None and self.policy_loss != "clip":
            raise ValueError(f"dual_clip_ratio: acts with policy_loss clip, not {self.policy_loss}; leave it out")
        if self.sapo_tau_positive <= 0 or self.sapo_tau_negative <= 0:
            raise ValueError("sapo_tau_positive, sapo_tau_negative: must be above 0; raise them")
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
    lengths = count_true(mask)
    log_probs = raised(log_probs)  # once, so that the gradients of all terms meet in float32
    token_loss, metrics = _token_loss(log_probs, batch, lengths, settings)

    def share(zeroed: Tensor, sample_weights: Tensor | None = None) -> Tensor:
        mode, length = settings.loss_agg_mode, settings.response_length
        return aggregate_sums(zeroed.sum(-1), lengths, denominators, mode, length, sample_weights)

    loss = share(token_loss, batch.sample_weights)
    metrics["actor/pg_loss"] = _share_metric(loss)
    if batch.ref_log_probs is not None:
        kl = kl_estimate(log_probs, batch.ref_log_probs, mask, settings.kl_loss_type)
        metrics["actor/kl_ref"] = _mean(kl, lengths)
        if settings.kl_loss_coef:
            kl_share = share(kl)
            metrics["actor/kl_loss"] = _share_metric(kl_share)
            loss = loss + settings.kl_loss_coef * kl_share
    elif settings.kl_loss_coef:
        raise ValueError("kl_loss_coef: the batch has no ref_log_probs; score it with the reference")
    if entropy is not None:
        entropy = zero_masked(entropy, mask)
        metrics["actor/entropy"] = _mean(entropy, lengths)
        if settings.entropy_loss_coef:
            loss = loss - settings.entropy_loss_coef * share(entropy)
    elif settings.entropy_loss_coef:
        raise ValueError("entropy_loss_coef: no entropy given; ask the engine to compute it")
    metrics["actor/total_loss"] = _share_metric(loss)
    return loss, metrics


def _token_loss(
    log_probs: Tensor, batch: TrainBatch, lengths: Tensor, settings: PolicyLossSettings
) -> tuple[Tensor, dict[str, Metric]]:
    """The policy-gradient loss [B, T], 0 where masked, with the correction's weights; and the metrics of its parts."""
    mask = batch.response_mask
    log_ratio = clamped_log_ratio(log_probs, batch.old_log_probs, mask)
    terms = Terms(
        log_probs=zero_masked(log_probs, mask),
        log_ratio=log_ratio,
        ratio=importance_ratio(log_ratio, mask, settings.importance_sampling),
        advantages=zero_masked(batch.advantages, mask).to(log_ratio.dtype),
        lengths=lengths,
        clip_low=settings.clip_low or 0.0,
        clip_high=settings.clip_high or 0.0,
        sapo_tau_positive=settings.sapo_tau_positive,
        sapo_tau_negative=settings.sapo_tau_negative,
    )
    token_loss, clipped = POLICY_LOSSES[settings.policy_loss](terms)
    dual_clipped = None
    if settings.dual_clip_ratio is not None:
        token_loss, dual_clipped = dual_clip(token_loss, terms.advantages, settings.dual_clip_ratio)
    metrics = _ratio_metrics(terms, mask)
    metrics |= _clip_metrics(clipped, dual_clipped, terms, settings.policy_loss in HAVE_A_CLIP_RANGE)
    if settings.correction is not None:
        weights, figures = correction_weights(batch.old_log_probs, batch.rollout_log_probs, mask, settings.correction)
        token_loss = token_loss * weights.to(token_loss.dtype)
        metrics |= figures
    return token_loss, metrics


def _share_metric(share: Tensor) -> Metric:
    return Metric(share.detach(), torch.ones_like(share), "sum")


def _mean(zeroed: Tensor, lengths: Tensor) -> Metric:
    """The mean over valid tokens of values [B, T] that are 0 where masked."""
    return Metric(zeroed.detach().sum(), lengths.sum())


@torch.no_grad()
def _ratio_metrics(terms: Terms, mask: Tensor) -> dict[str, Metric]:
    """Means over the valid tokens of ratio, |ratio - 1|, log-prob and k3 of KL(old || current); ratio bounds.

    A micro-batch without a valid token has bounds beyond any ratio, which lose against any other.
    """
    ratio, lengths = terms.ratio, terms.lengths
    one, num_tokens = torch.ones_like(ratio[0, 0]), lengths.sum()
    excess = ratio - 1.0  # 0 where masked
    beyond = (~mask).view(torch.uint8).to(ratio.dtype).mul_(torch.finfo(ratio.dtype).max)  # adds nothing where valid
    kl = terms.log_ratio.expm1().sub_(terms.log_ratio).clamp_(max=MAX_K3)
    return {
        "actor/ratio_mean": Metric(excess.sum() + num_tokens, num_tokens),
        "actor/ratio_max": Metric((ratio - beyond).amax(), one, "max"),
        "actor/ratio_min": Metric((ratio + beyond).amin(), one, "min"),
        "actor/ratio_deviation": _mean(excess.abs_(), lengths),
        "actor/approx_kl": _mean(kl, lengths),
        "actor/log_prob_mean": _mean(terms.log_probs, lengths),
    }


def _clip_metrics(clipped: Tensor, dual_clipped: Tensor | None, terms: Terms, has_range: bool) -> dict[str, Metric]:
    """Where the clip took the gradient away: per valid token (what the GSPO paper plots) and per sequence.

    A sequence counts once, as soon as one of its tokens is clipped. `high` and `low` are the side on which the ratio
    left the range, and add up to the fraction of tokens. The dual clip is counted per valid token.
    """
    dtype, num_tokens = terms.advantages.dtype, terms.lengths.sum()

    def share_of_tokens(count: Tensor) -> Metric:
        return Metric(count.to(dtype), num_tokens)

    counts = count_true(clipped)  # never where masked: the ratio is 1 and the advantage 0 there
    metrics = {
        "actor/clip_fraction": share_of_tokens(counts.sum()),
        "actor/clip_fraction_sequence": Metric((counts > 0).sum().to(dtype), (terms.lengths > 0).sum()),
    }
    if has_range:
        high = count_true(clipped & (terms.ratio.detach() > 1))
        metrics["actor/clip_fraction_high"] = share_of_tokens(high.sum())
        metrics["actor/clip_fraction_low"] = share_of_tokens((counts - high).sum())
    if dual_clipped is not None:
        metrics["actor/dual_clip_fraction"] = share_of_tokens(count_true(dual_clipped).sum())
    return metrics
