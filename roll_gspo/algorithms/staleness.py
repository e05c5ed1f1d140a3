"""Metrics of stale samples: tokens that older weights sampled than those that they are trained with.

The *lag* of a token is the version of the trainer's weights before the update minus the version that sampled the token.
Lag 0 is on-policy: its difference of log-probs is the mismatch of the engines alone. At lag k the difference also
contains k versions of training.

Metrics per lag use five buckets, because the number of tokens falls and the noise grows with the lag.
Legend: `d_it = old_log_probs_it - rollout_log_probs_it`, trainer minus engine.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from roll_gspo.algorithms.correction import CORRECTION_LEVELS, mismatch_metrics
from roll_gspo.algorithms.kl import k3
from roll_gspo.algorithms.masking import masked_difference
from roll_gspo.algorithms.ratio import MAX_LOG_RATIO
from roll_gspo.metrics import Metric, ess_of, mean_of

BUCKETS = ("0", "1", "2", "3_4", "5_up")
"""Names of the buckets in metrics, e.g. `actor/clip_fraction_lag_3_4`."""
_LAST_LAGS = (0, 1, 2, 4)  # of each bucket but the last


def lag_buckets(lags: Tensor) -> Tensor:
    """Return [B, T] int8: the index in `BUCKETS` of each lag [B, T]."""
    return torch.bucketize(lags, torch.tensor(_LAST_LAGS, device=lags.device)).to(torch.int8)


def lag_metrics(lags: Tensor, response_mask: Tensor, max_lag: int = 0) -> dict[str, float]:
    """Return the distribution of the lags [B, T] over the valid tokens of a rollout.

    * `staleness/mean`, `staleness/max`: over the tokens.
    * `staleness/sample_max_mean`: the largest lag of a sample, averaged over the samples with a token.
    * `staleness/share_0` to `staleness/share_N`: fraction of the tokens with each lag. N is the largest lag of the
      rollout, at least `max_lag`.
    """
    present = lags[response_mask]
    counts = torch.bincount(present.long(), minlength=max_lag + 1).double()
    total = max(len(present), 1)
    of_samples = torch.where(response_mask, lags, 0).amax(-1)[response_mask.any(-1)].double()
    return {
        "staleness/mean": float(present.double().sum()) / total,
        "staleness/max": float(present.max()) if len(present) else 0.0,
        "staleness/sample_max_mean": float(of_samples.sum()) / max(len(of_samples), 1),
        **{f"staleness/share_{lag}": float(count) / total for lag, count in enumerate(counts)},
    }


@torch.no_grad()
def effective_sample_size(
    old_log_probs: Tensor, rollout_log_probs: Tensor, response_mask: Tensor, level: str
) -> Metric:
    """Return the effective sample size of the weights `pi_old / pi_rollout` before any bound, over their number.

    `(sum_i w_i)^2 / (N sum_i w_i^2)` is 1 if both policies agree, and 1/N if one weight exceeds all others.

    Args:
        old_log_probs, rollout_log_probs: [B, T] of the trainer before the update and of the generation engine.
        response_mask: [B, T] bool, the tokens that count.
        level: a name in `CORRECTION_LEVELS`. `token` has one weight per token, `geometric` and `sequence` have one per
            sample. Exponents are clamped to +-20.
    """
    difference = masked_difference(old_log_probs, rollout_log_probs, response_mask).double()
    exponents = CORRECTION_LEVELS[level](difference, response_mask.sum(-1, keepdim=True))
    weights = exponents.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    per_token = weights.shape == response_mask.shape
    return ess_of(weights, response_mask if per_token else response_mask.any(-1, keepdim=True))


@torch.no_grad()
def engine_metrics(
    old_log_probs: Tensor, rollout_log_probs: Tensor, response_mask: Tensor, buckets: Tensor | None, level: str
) -> dict[str, Metric]:
    """Return the metrics of trainer against generation engine; `mismatch/*` are those of the tokens without lag.

    If no token is on-policy, there are no `mismatch/*`. Per bucket with at least one token:

    * `staleness/log_prob_diff_mean_lag_*`: mean of `|d|`.
    * `staleness/kl_lag_*`: KL(rollout || old) per token by k3 (`exp(d) - 1 - d`), as the rollout policy sampled.
    * `staleness/ess_lag_*`: `effective_sample_size` of the bucket's tokens. A sample's weight is that of its tokens in
      the bucket.

    Args:
        old_log_probs, rollout_log_probs: [B, T] of the trainer before the update and of the generation engine.
        response_mask: [B, T] bool.
        buckets: [B, T] int8 of `lag_buckets`; None if no token is stale.
        level: of the effective sample size.
    """
    if buckets is None:
        return mismatch_metrics(old_log_probs, rollout_log_probs, response_mask)
    metrics = {"staleness/ess": effective_sample_size(old_log_probs, rollout_log_probs, response_mask, level)}
    difference = masked_difference(old_log_probs, rollout_log_probs, response_mask)
    for name, inside in _present(buckets, response_mask):
        if name == BUCKETS[0]:
            metrics |= mismatch_metrics(old_log_probs, rollout_log_probs, inside)
        metrics |= {
            f"staleness/log_prob_diff_mean_lag_{name}": mean_of(difference.abs(), inside),
            f"staleness/kl_lag_{name}": mean_of(k3(-difference), inside),
            f"staleness/ess_lag_{name}": effective_sample_size(old_log_probs, rollout_log_probs, inside, level),
        }
    return metrics


@torch.no_grad()
def ratio_metrics_by_lag(
    ratio: Tensor, clipped: Tensor, response_mask: Tensor, buckets: Tensor, clip_range: tuple[float, float] | None
) -> dict[str, Metric]:
    """Return metrics of the importance ratio of current to old policy per bucket with at least one token.

    * `actor/clip_fraction_lag_*`: fraction of clipped tokens.
    * `actor/ratio_min_lag_*`, `actor/ratio_max_lag_*`: extremes.
    * `actor/ratio_tail_lag_*`: fraction of tokens whose ratio is outside of twice the clip range, `[1 - 2 low,
      1 + 2 high]`. Omitted without a clip range.

    Args:
        ratio: [B, T] at the level of the loss.
        clipped: [B, T] bool of the policy loss.
        response_mask: [B, T] bool.
        buckets: [B, T] int8 of `lag_buckets`.
        clip_range: (low, high) around 1 if the loss clips `ratio` itself, else None.
    """
    metrics = {}
    one = ratio.new_ones(())
    for name, inside in _present(buckets, response_mask):
        metrics |= {
            f"actor/clip_fraction_lag_{name}": mean_of(clipped.to(ratio.dtype), inside),
            f"actor/ratio_min_lag_{name}": Metric(torch.where(inside, ratio, torch.inf).amin(), one, "min"),
            f"actor/ratio_max_lag_{name}": Metric(torch.where(inside, ratio, -torch.inf).amax(), one, "max"),
        }
        if clip_range is not None:
            low, high = clip_range
            beyond = (ratio < 1 - 2 * low) | (ratio > 1 + 2 * high)
            metrics[f"actor/ratio_tail_lag_{name}"] = mean_of(beyond.to(ratio.dtype), inside)
    return metrics


def _present(buckets: Tensor, response_mask: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tokens [B, T] bool of every bucket that has a valid token."""
    tokens = [response_mask & (buckets == index) for index in range(len(BUCKETS))]
    present = torch.stack([inside.any() for inside in tokens]).tolist()  # the only wait for the device
    for name, inside, found in zip(BUCKETS, tokens, present, strict=True):
        if found:
            yield name, inside
