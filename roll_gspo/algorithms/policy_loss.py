"""The policy loss of a micro-batch: ratio, objective, weights, aggregation, KL and entropy terms, metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators, aggregate, aggregate_sums
from roll_gspo.algorithms.correction import correction_weights
from roll_gspo.algorithms.kl import MAX_K3, kl_estimate
from roll_gspo.algorithms.masking import count_true, masked_difference, raised, zero_masked
from roll_gspo.algorithms.objective import PolicyLossSettings, Terms, dual_clip
from roll_gspo.algorithms.ratio import clamped_log_ratio
from roll_gspo.algorithms.staleness import ratio_metrics_by_lag
from roll_gspo.batch import TrainBatch
from roll_gspo.declarations import POLICY_LOSSES, RATIOS
from roll_gspo.metrics import Metric


def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    batch: TrainBatch,
    denominators: Denominators,
    settings: PolicyLossSettings,
    policy_denominators: Denominators | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """Return this micro-batch's share of `pg_loss + kl_loss_coef kl - entropy_loss_coef entropy`, and its metrics.

    The shares of a mini-batch's micro-batches add up to its loss. Half precision is computed in float32.

    Args:
        log_probs: [B, T] of the current policy, with gradient.
        entropy: [B, T] of the current policy's token distributions, or None.
        batch: the samples; masked positions may hold anything.
        denominators: of the whole mini-batch.
        settings: of the policy loss.
        policy_denominators: of the tokens in `batch.policy_mask`; None if that is None.

    Returns:
        The scalar loss, and metrics without gradient: `actor/{pg,kl,total}_loss` are shares; the others are means
        over valid tokens or sequences, or extremes.

    Raises:
        ValueError: the entropy or the reference log-probabilities that a coefficient needs are missing.
    """
    mask = batch.response_mask
    lengths = count_true(mask)
    log_probs = raised(log_probs)  # once, so that the gradients of all terms meet in float32
    token_loss, metrics = _token_loss(log_probs, batch, lengths, settings)

    mode, length = settings.loss_agg_mode, settings.response_length

    def share(zeroed: Tensor) -> Tensor:
        return aggregate_sums(zeroed.sum(-1), lengths, denominators, mode, length)

    if batch.policy_mask is None or policy_denominators is None:
        loss = aggregate_sums(token_loss.sum(-1), lengths, denominators, mode, length, batch.sample_weights)
    else:
        loss = aggregate(token_loss, batch.policy_mask & mask, policy_denominators, mode, length, batch.sample_weights)
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
    """Return the policy-gradient loss [B, T], corrected and 0 where masked, and the metrics of its parts."""
    mask = batch.response_mask
    declared = POLICY_LOSSES.declaration(settings.policy_loss)
    log_ratio = clamped_log_ratio(log_probs, batch.old_log_probs, mask)
    terms = Terms(
        log_probs=zero_masked(log_probs, mask),
        log_ratio=log_ratio,
        ratio=RATIOS.load(settings.importance_sampling)(log_ratio, mask, **settings.importance_sampling_args),
        advantages=zero_masked(batch.advantages, mask).to(log_ratio.dtype),
        response_mask=mask,
        lengths=lengths,
        ref_log_probs=_reference(batch, settings.policy_loss) if declared.needs_reference else None,
    )
    loss_function = POLICY_LOSSES.load(settings.policy_loss)
    token_loss, clipped = loss_function(terms, settings, **settings.policy_loss_args)
    dual_clipped = None
    if settings.dual_clip_ratio is not None:
        token_loss, dual_clipped = dual_clip(token_loss, terms.advantages, settings.dual_clip_ratio)
    metrics = _ratio_metrics(terms, mask)
    metrics |= _clip_metrics(clipped, dual_clipped, terms, declared.needs_clip_range)
    if batch.length_quartiles is not None:
        metrics |= _clip_metrics_by_length(clipped, lengths, batch.length_quartiles)
    if batch.lag_buckets is not None:
        clips_ratio = declared.needs_clip_range and not declared.own_ratio and not settings.pg_clip_length_scaling
        clip_range = settings.clip_range if clips_ratio else None
        metrics |= ratio_metrics_by_lag(terms.ratio.detach(), clipped, mask, batch.lag_buckets, clip_range)
    if settings.off_policy_mask_threshold is not None:
        kept, mask_metrics = _off_policy_mask(log_probs, batch, lengths, settings.off_policy_mask_threshold)
        token_loss = torch.where(kept, token_loss, 0.0)
        metrics |= mask_metrics
    if settings.correction is not None:
        weights, weight_metrics = correction_weights(
            batch.old_log_probs, batch.rollout_log_probs, mask, settings.correction
        )
        token_loss = token_loss * weights.to(token_loss.dtype)
        metrics |= weight_metrics
    return token_loss, metrics


@torch.no_grad()
def _off_policy_mask(
    log_probs: Tensor, batch: TrainBatch, lengths: Tensor, threshold: float
) -> tuple[Tensor, dict[str, Metric]]:
    """Return [B, T] bool, false for the tokens that off-policy sequence masking drops, and the fraction of samples.

    It drops tokens with negative advantage in samples whose mean of `log pi_old - log pi` is above the threshold
    (DeepSeek-V3.2, arXiv 2512.02556, eqs. 8 and 9). `pi_old` is the generation engine, so that the mean includes both
    the updates since then and the mismatch of the engines.
    """
    moved = masked_difference(batch.rollout_log_probs, log_probs, batch.response_mask).sum(-1) / lengths.clamp(min=1)
    dropped = (moved > threshold)[:, None] & (batch.advantages < 0) & batch.response_mask
    share = Metric(dropped.any(-1).sum().to(log_probs.dtype), (lengths > 0).sum())
    return ~dropped, {"actor/off_policy_masked_fraction": share}


def _reference(batch: TrainBatch, policy_loss: str) -> Tensor:
    """Return the reference log-probs [B, T], 0 where masked."""
    if batch.ref_log_probs is None:
        raise ValueError(f"policy_loss: '{policy_loss}' got no ref_log_probs; score the batch with the reference")
    return zero_masked(batch.ref_log_probs, batch.response_mask)


def _share_metric(share: Tensor) -> Metric:
    return Metric(share.detach(), torch.ones_like(share), "sum")


def _mean(zeroed: Tensor, lengths: Tensor) -> Metric:
    """Return the mean over valid tokens of values [B, T] that are 0 where masked."""
    return Metric(zeroed.detach().sum(), lengths.sum())


@torch.no_grad()
def _ratio_metrics(terms: Terms, mask: Tensor) -> dict[str, Metric]:
    """Return means over valid tokens of ratio, |ratio - 1|, log-prob and k3 of KL(old || current); ratio extremes.

    A micro-batch without a valid token has a maximum below and a minimum above any ratio, so that merging ignores them.
    """
    ratio, lengths = terms.ratio, terms.lengths
    one, num_tokens = torch.ones_like(ratio[0, 0]), lengths.sum()
    excess = ratio - 1.0  # 0 where masked
    beyond = (~mask).view(torch.uint8).to(ratio.dtype).mul_(torch.finfo(ratio.dtype).max)  # 0 where valid
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
    """Return the fractions that were clipped: per valid token (plotted in the GSPO paper) and per sequence.

    A sequence counts if any of its tokens is clipped. `high` and `low` are the side on which the ratio left the range;
    they add up to the fraction of tokens. The dual clip is counted per valid token.
    """
    dtype, num_tokens = terms.advantages.dtype, terms.lengths.sum()

    def share_of_tokens(count: Tensor) -> Metric:
        return Metric(count.to(dtype), num_tokens)

    counts = count_true(clipped)  # 0 where masked, since the ratio is 1 and the advantage 0
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


def _clip_metrics_by_length(clipped: Tensor, lengths: Tensor, quartiles: Tensor) -> dict[str, Metric]:
    """Return the fraction of clipped tokens in each quartile of the rollout's response lengths."""
    counts = count_true(clipped).to(torch.float32)
    metrics = {}
    for quartile in range(4):
        inside = quartiles == quartile  # as factors: an index of unknown length would wait for the device
        metrics[f"actor/clip_fraction_length_q{quartile + 1}"] = Metric(
            (counts * inside).sum(), (lengths * inside).sum()
        )
    return metrics


def has_gradient(batch: TrainBatch, settings: PolicyLossSettings) -> bool:
    """Return whether the loss of these samples depends on the policy.

    It does not if no token is valid. It does not either if every advantage is 0 and there is no KL and no entropy term,
    because the shipped policy losses are then 0 for any policy. A user's policy loss may have other terms.
    """
    mask = batch.response_mask
    if not bool(mask.any()):
        return False
    if settings.kl_loss_coef or settings.entropy_loss_coef or settings.policy_loss not in POLICY_LOSSES:
        return True
    seen = mask if batch.policy_mask is None else mask & batch.policy_mask
    return bool((zero_masked(batch.advantages, seen) != 0).any())
