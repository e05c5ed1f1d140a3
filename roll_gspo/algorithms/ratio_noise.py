"""Importance ratios at equal weights: they should be 1, and rounding makes them differ.

Half precision rounds differently in the pass that gives the old log-probs and in the pass that trains, if these compute
other batches. The sequence ratio of GSPO has a clip range of 3e-4, which rounding may exceed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.ratio import clamped_log_ratio
from roll_gspo.declarations import RATIOS
from roll_gspo.metrics import Metric, rms_of


@torch.no_grad()
def ratio_rms(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor, settings: PolicyLossSettings) -> Metric:
    """Return the root mean square of the log of the ratio on the scale that the clip range bounds.

    | loss | mean over | of the square of |
    |---|---|---|
    | `importance_sampling: token` | valid tokens | `d_it` |
    | `seq`, `seq_token` | samples | `sum_t d_it / n_i` |
    | `segment` | samples | the mean of a segment, weighted by its tokens |
    | `pg_clip_length_scaling`, `policy_loss: fspo` | samples | `sum_t d_it / sqrt(n_i)` |

    Your own `importance_sampling` counts by its declared `scale`, per token if that is empty.

    Args:
        log_probs, old_log_probs: [B, T] of two policies.
        response_mask: [B, T] bool, the tokens that count.
        settings: of the policy loss.
    """
    mask = response_mask
    # float64, because the log of a float32 ratio near 1 has an error of 6e-8.
    log_ratio = clamped_log_ratio(log_probs.double(), old_log_probs.double(), mask)
    lengths, present = mask.sum(-1, keepdim=True).clamp(min=1), mask.any(-1, keepdim=True)
    if settings.pg_clip_length_scaling or settings.policy_loss == "fspo":
        return rms_of((log_ratio.sum(-1, keepdim=True) / lengths.sqrt()).float(), present)
    level = settings.importance_sampling
    of_loss = RATIOS.load(level)(log_ratio, mask, **settings.importance_sampling_args).log()
    if RATIOS.declaration(level).scale != "sequence":
        return rms_of(of_loss.float(), mask)
    squares = torch.where(mask, of_loss, 0.0).square().sum(-1, keepdim=True) / lengths
    return Metric(squares.sum().float(), present.sum(), "rms")


def engine_ratio(
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    response_mask: Tensor,
    buckets: Tensor | None,
    settings: PolicyLossSettings,
) -> dict[str, Metric]:
    """Return `mismatch/ratio_rms`: `ratio_rms` of trainer over generation engine at equal weights.

    Samples with a stale token do not count. If all have one, the result is empty.

    Args:
        log_probs, rollout_log_probs: [B, T] of the trainer before the update and of the generation engine.
        response_mask: [B, T] bool.
        buckets: [B, T] int8 of `staleness.lag_buckets`; None if no token is stale.
        settings: of the policy loss.
    """
    mask = response_mask
    if buckets is not None:
        mask = mask & ~((buckets > 0) & mask).any(-1, keepdim=True)
        if not bool(mask.any()):
            return {}
    return {"mismatch/ratio_rms": ratio_rms(log_probs, rollout_log_probs, mask, settings)}
