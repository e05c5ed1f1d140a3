"""The critic's loss (clipped squared error between values and returns) and explained variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators, aggregate
from roll_gspo.algorithms.masking import masked_difference, zero_masked
from roll_gspo.batch import TrainBatch
from roll_gspo.metrics import Metric


@dataclass(frozen=True)
class ValueLossSettings:
    """Settings of the value loss.

    Attributes:
        value_clip: bound of the change of a value since the rollout was scored, or None.
        loss_agg_mode: a name in `LOSS_AGG_MODES`.
        response_length: maximum response length in tokens; only `seq-mean-token-sum-norm` divides by it.
    """

    value_clip: float | None = None
    loss_agg_mode: str = "token-mean"
    response_length: int = 1


def value_loss(
    values: Tensor, batch: TrainBatch, denominators: Denominators, settings: ValueLossSettings
) -> tuple[Tensor, dict[str, Metric]]:
    """Return this micro-batch's share of `0.5 max((v - R)^2, (clip(v, v_old +- value_clip) - R)^2)`, and its metrics.

    Source: the value clip of PPO2, arXiv 2005.12729, section 3; R are the returns of GAE. The shares of a mini-batch's
    micro-batches add up to its loss. Half precision is computed in float32. Sample weights are not used.

    Args:
        values: [B, T] of the current critic, with gradient; anything where masked.
        batch: the samples, with `returns`; with a clip also `values` of the critic before its update.
        denominators: of the whole mini-batch.
        settings: of the value loss.

    Returns:
        The scalar loss, and metrics without gradient: `critic/loss` is a share; `critic/value_mean`,
        `critic/return_mean` and `critic/clip_fraction` (the clip removed the gradient) are means over valid tokens.

    Raises:
        ValueError: the batch has no returns, or no values to clip against.
    """
    if batch.returns is None:
        raise ValueError("value_loss: the batch has no returns; use an adv_estimator that needs a critic")
    mask = batch.response_mask
    values = zero_masked(values, mask)
    returns = zero_masked(batch.returns, mask).to(values.dtype)
    errors = (values - returns).square()
    num_clipped = mask.new_zeros((), dtype=torch.int64)
    if settings.value_clip is not None:
        if batch.values is None:
            raise ValueError("value_clip: the batch has no values of the critic before its update; score it first")
        # If the bounded value is farther from the return, it is at its bound: a constant without gradient.
        with torch.no_grad():
            old = batch.values.to(values.dtype)
            moved = values - old
            bounded = moved.clamp(-settings.value_clip, settings.value_clip).add_(old)
            bounded_errors = bounded.sub_(returns).square_()
            # Within the range, rounding alone may make the bounded error the larger one; that is no clip. Old values
            # may be anything where masked.
            clipped = (bounded_errors > errors) & (moved.abs() > settings.value_clip) & mask
            num_clipped = clipped.sum()
        errors = torch.where(clipped, bounded_errors, errors)
    share = 0.5 * aggregate(errors, mask, denominators, settings.loss_agg_mode, settings.response_length)
    num_tokens = mask.sum()
    metrics = {
        "critic/loss": Metric(share.detach(), torch.ones_like(share), "sum"),
        "critic/value_mean": Metric(values.detach().sum(), num_tokens),
        "critic/return_mean": Metric(returns.sum(), num_tokens),
        "critic/clip_fraction": Metric(num_clipped, num_tokens),
    }
    return share, metrics


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> float:
    """Return `1 - var(R - V) / var(R)` over the valid tokens of a whole rollout; all inputs are [B, T].

    1 is a perfect critic, 0 one that is no better than a constant, and negative values are worse. 0 if the returns do
    not vary.
    """
    errors = masked_difference(returns, values, response_mask)[response_mask].double()
    variance = returns[response_mask].double()
    if len(variance) < 2 or bool((variance == variance[0]).all()):
        return 0.0
    return float(1.0 - errors.var() / variance.var())
