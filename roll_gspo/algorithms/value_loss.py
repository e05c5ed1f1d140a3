"""The critic's loss: clipped squared error between values and returns, and how much of the returns it explains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.aggregate import LOSS_AGG_MODES, Denominators, aggregate
from roll_gspo.algorithms.choice import choose
from roll_gspo.algorithms.masking import masked_difference, zero_masked
from roll_gspo.batch import TrainBatch
from roll_gspo.metrics import Metric


@dataclass(frozen=True)
class ValueLossSettings:
    """The choices of the value loss.

    Attributes:
        value_clip: how far a value may move from the one that the rollout was scored with, or None for any distance.
        loss_agg_mode: a name in `LOSS_AGG_MODES`.
        response_length: the longest response the run allows, in tokens; only `seq-mean-token-sum-norm` divides by it.

    Raises:
        ValueError: a name is unknown or a number is out of range.
    """

    value_clip: float | None = None
    loss_agg_mode: str = "token-mean"
    response_length: int = 1

    def __post_init__(self) -> None:
        choose(LOSS_AGG_MODES, "loss_agg_mode", self.loss_agg_mode)
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(f"value_clip: {self.value_clip} is not above 0; use e.g. 0.2, or null for no clip")
        if self.response_length < 1:
            raise ValueError(f"response_length: {self.response_length} is below 1; give the limit in tokens")


def value_loss(
    values: Tensor, batch: TrainBatch, denominators: Denominators, settings: ValueLossSettings
) -> tuple[Tensor, dict[str, Metric]]:
    """This micro-batch's share of `0.5 max((v - R)^2, (clip(v, v_old +- value_clip) - R)^2)`, and its metrics.

    Source: the value clip of PPO2, arXiv 2005.12729, section 3; R are the returns of GAE. Shares of the micro-batches
    of a mini-batch add up to its loss. Half precision is computed in float32. Sample weights play no part.

    Args:
        values: [B, T] of the critic now, with gradient; anything where masked.
        batch: the samples, with `returns`, and `values` of the critic before its update if there is a clip.
        denominators: of the whole mini-batch.
        settings: the choices.

    Returns:
        The scalar loss, and metrics without gradient: `critic/loss` is a share; `critic/value_mean`,
        `critic/return_mean` and `critic/clip_fraction` (the clip took the gradient away) are means over valid tokens.

    Raises:
        ValueError: the batch has no returns, or no values to clip against.
    """
    if batch.returns is None:
        raise ValueError("value_loss: the batch has no returns; use adv_estimator gae")
    mask = batch.response_mask
    values = zero_masked(values, mask)
    returns = zero_masked(batch.returns, mask).to(values.dtype)
    errors = (values - returns).square()
    num_clipped = mask.new_zeros((), dtype=torch.int64)
    if settings.value_clip is not None:
        if batch.values is None:
            raise ValueError("value_clip: the batch has no values of the critic before its update; score it first")
        # Where the bounded value is the farther one it is at its bound: a constant, without a gradient.
        with torch.no_grad():
            old = batch.values.to(values.dtype)
            moved = values - old
            bounded = moved.clamp(-settings.value_clip, settings.value_clip).add_(old)
            bounded_errors = bounded.sub_(returns).square_()
            # within the range rounding alone may make the bounded error the larger one: that is no clip; old values
            # may be anything where masked
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
    """`1 - var(R - V) / var(R)` over the valid tokens of a whole rollout, all inputs [B, T].

    1 is a critic that knows, 0 one that is no better than a constant, negative one that is worse. 0 where the returns
    do not vary.
    """
    errors = masked_difference(returns, values, response_mask)[response_mask].double()
    variance = returns[response_mask].double()
    if len(variance) < 2 or bool((variance == variance[0]).all()):
        return 0.0
    return float(1.0 - errors.var() / variance.var())
