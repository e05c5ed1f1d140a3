"""Rewards to advantages of a whole rollout, in the order: normalise, clip, KL, estimate, whiten, clip.

Legend: B samples of the rollout (all ranks), T response positions. Everything here is without gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from roll_gspo.algorithms.advantage_estimators import (
    ADVANTAGE_ESTIMATORS,
    CRITIC_ESTIMATORS,
    GROUP_ESTIMATORS,
    WHITENED_ESTIMATORS,
    ShapedRewards,
)
from roll_gspo.algorithms.choice import choose
from roll_gspo.algorithms.kl import KL_ESTIMATORS, kl_estimate
from roll_gspo.algorithms.masking import zero_masked
from roll_gspo.algorithms.reward_norm import (
    RunningMoments,
    check_reward_norm,
    clip_rewards,
    groups_without_spread,
    normalise_rewards,
)

WHITENING_EPSILON = 1e-8


@dataclass(frozen=True)
class AdvantageSettings:
    """The choices between score and advantage.

    Attributes:
        adv_estimator: a name in `ADVANTAGE_ESTIMATORS`.
        gamma: discount per valid token; `reinforce`, `reinforce_plus_plus` and `gae` use it.
        reward_norm, reward_shift, reward_scale: see `normalise_rewards`.
        reward_clip: bound of the normalised reward, or None.
        add_token_level_kl: subtract `kl_coef * kl` from the reward of every token.
        kl_penalty: the estimator of that KL, a name in `KL_ESTIMATORS`.
        whiten_advantages: zero mean and unit variance over all valid tokens.
        advantage_clip: bound of the advantage, or None.
        lambd: of GAE: 1 is reward-to-go minus value, 0 the one-step residual.

    Raises:
        ValueError: a name is unknown, a number is out of range or the reward flags contradict each other.
    """

    adv_estimator: str = "grpo"
    gamma: float = 1.0
    reward_norm: str | None = None
    reward_shift: bool = False
    reward_scale: bool = False
    reward_clip: float | None = None
    add_token_level_kl: bool = False
    kl_penalty: str = "kl"
    whiten_advantages: bool = False
    advantage_clip: float | None = None
    lambd: float = 0.95

    def __post_init__(self) -> None:
        choose(ADVANTAGE_ESTIMATORS, "adv_estimator", self.adv_estimator)
        choose(KL_ESTIMATORS, "kl_penalty", self.kl_penalty)
        check_reward_norm(self.reward_norm, self.reward_shift, self.reward_scale)
        for key, value in (("gamma", self.gamma), ("lambd", self.lambd)):
            if not 0 <= value <= 1:
                raise ValueError(f"{key}: {value} is not a discount; use a number from 0 to 1")

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened, by choice or by the estimator's definition."""
        return self.whiten_advantages or self.adv_estimator in WHITENED_ESTIMATORS

    @property
    def compares_groups(self) -> bool:
        """Whether a sample's advantage depends on the other samples of its prompt."""
        return self.adv_estimator in GROUP_ESTIMATORS or self.reward_norm == "group"


class Estimated(NamedTuple):
    """What a rollout is trained on.

    Attributes:
        advantages: [B, T], 0 where the loss does not look.
        returns: [B, T] what the critic learns to predict, 0 where masked; None without a critic.
        statistics: of rewards and advantages, see `advantages`.
    """

    advantages: Tensor
    returns: Tensor | None
    statistics: dict[str, float]


class TokenMoments(NamedTuple):
    """Of the valid tokens of [B, T]: count, mean, unbiased std (0 of fewer than two), bounds; all 0 of none."""

    count: int = 0
    mean: float = 0.0
    std: float = 0.0
    low: float = 0.0
    high: float = 0.0


def _centred(values: Tensor, mask: Tensor) -> tuple[Tensor, TokenMoments]:
    """`values` [B, T], 0 where masked, minus the mean of the valid tokens, again 0 where masked; and the moments."""
    lengths = mask.sum(-1)
    count = int(lengths.sum())
    if not count:
        return values, TokenMoments()
    # Some valid token stands in where masked, so that the bounds are those of the valid tokens.
    row = int(lengths.argmax())
    example = float(values[row, int(mask[row].to(torch.uint8).argmax())])
    low, high = (float(bound) for bound in torch.where(mask, values, example).aminmax())
    # Equal values have exactly their value as mean, and so no spread: rounding noise would be a signal.
    mean = low if low == high else float(values.sum(-1).sum(dtype=torch.float64)) / count
    centred = torch.where(mask, values - mean, 0.0)
    squares = float(centred.square().sum(-1).sum(dtype=torch.float64))
    return centred, TokenMoments(count, mean, math.sqrt(squares / max(count - 1, 1)), low, high)


def whiten(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Zero mean and unit unbiased variance over the valid tokens of [B, T]; 0 where masked.

    Fewer than two valid tokens are left as they are; equal advantages become 0.
    """
    return _whitened(zero_masked(advantages, response_mask), response_mask)[0]


def _whitened(values: Tensor, mask: Tensor) -> tuple[Tensor, TokenMoments]:
    """`whiten` of `values` that are 0 where masked, and the moments of the result."""
    centred, moments = _centred(values, mask)
    if moments.count < 2:
        return values, moments
    scale = moments.std + WHITENING_EPSILON
    low, high = (moments.low - moments.mean) / scale, (moments.high - moments.mean) / scale
    return centred.div_(scale), TokenMoments(moments.count, 0.0, moments.std / scale, low, high)


def clip_advantages(advantages: Tensor, response_mask: Tensor, advantage_clip: float | None) -> tuple[Tensor, float]:
    """[B, T] clamped to +-`advantage_clip` (None: as they are), and the fraction of valid tokens beyond."""
    if advantage_clip is None:
        return advantages, 0.0
    count = max(int(response_mask.sum()), 1)
    beyond = int(((advantages.abs() > advantage_clip) & response_mask).sum())
    return advantages.clamp(-advantage_clip, advantage_clip), beyond / count


def _reward_statistics(scores: Tensor, group_ids: Tensor, rewards: Tensor) -> dict[str, float]:
    """Mean, std, min and max of the scores [B] (zeros of none, std 0 of one), and the mean of the rewards [B]."""
    flat = scores.double() if len(scores) else scores.new_zeros(1).double()
    return {
        "reward/score_mean": float(flat.mean()),
        "reward/score_std": float(flat.std()) if len(flat) > 1 else 0.0,
        "reward/score_min": float(flat.min()),
        "reward/score_max": float(flat.max()),
        "reward/mean": float(rewards.double().mean()) if len(rewards) else 0.0,
        "reward/groups_without_spread": groups_without_spread(scores, group_ids),
    }


@torch.no_grad()
def advantages(
    scores: Tensor,
    group_ids: Tensor,
    response_mask: Tensor,
    settings: AdvantageSettings,
    *,
    log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    running: RunningMoments | None = None,
    values: Tensor | None = None,
    loss_mask: Tensor | None = None,
) -> Estimated:
    """Advantages of a whole rollout and what they were made of.

    Args:
        scores: [B] of the reward workers.
        group_ids: [B] integers; samples of one prompt share one.
        response_mask: [B, T] bool.
        settings: the choices.
        log_probs, ref_log_probs: [B, T] of the sampling policy and the reference, for `add_token_level_kl`.
        kl_coef: of the KL controller, for `add_token_level_kl`.
        running: the run's moments, for `reward_norm: running`; this rollout is taken in.
        values: [B, T] of the critic, for `gae`.
        loss_mask: [B, T] bool, the valid tokens of the samples that the loss sees; None for `response_mask`. The
            others count in the moments of the rewards, not in whitening and the statistics of the advantages.

    Returns:
        Advantages (0 outside `loss_mask`; float32, or float64 for float64 scores), for `gae` the returns (advantages
        before whitening, plus values), and the statistics `reward/score_{mean,std,min,max}` (as given), `reward/mean`
        (normalised and clipped), `reward/clip_fraction`, `reward/groups_without_spread`, `advantage/{mean,std,min,max}`
        (before the clip), `advantage/clip_fraction` and, with `add_token_level_kl`, `reward/kl` (per valid token).

    Raises:
        ValueError: log-probabilities, values or moments that the settings need are missing.
    """
    rewards = normalise_rewards(
        scores, group_ids, settings.reward_norm, settings.reward_shift, settings.reward_scale, running
    )
    rewards, clip_fraction = clip_rewards(rewards, settings.reward_clip)
    statistics = _reward_statistics(scores, group_ids, rewards) | {"reward/clip_fraction": clip_fraction}
    penalties = None
    if settings.add_token_level_kl:
        if log_probs is None or ref_log_probs is None:
            raise ValueError("add_token_level_kl: log_probs or ref_log_probs missing; build the reference")
        kl = kl_estimate(log_probs, ref_log_probs, response_mask, settings.kl_penalty)
        statistics["reward/kl"] = float(kl.sum(-1).sum(dtype=torch.float64)) / max(int(response_mask.sum()), 1)
        penalties = kl_coef * kl
    group_normalised = settings.reward_norm == "group"
    shaped = ShapedRewards(
        rewards, penalties, group_ids, response_mask, group_normalised, settings.gamma, settings.lambd, values
    )
    estimated = ADVANTAGE_ESTIMATORS[settings.adv_estimator](shaped).expand(response_mask.shape)
    returns = None
    if settings.adv_estimator in CRITIC_ESTIMATORS and values is not None:
        returns = zero_masked(estimated + values, response_mask)

    seen = response_mask if loss_mask is None else response_mask & loss_mask
    final, of_advantages = _finished(estimated, seen, settings)
    return Estimated(final, returns, statistics | of_advantages)


def _finished(estimated: Tensor, mask: Tensor, settings: AdvantageSettings) -> tuple[Tensor, dict[str, float]]:
    """Whitened and clipped as the settings say, over `mask`; 0 elsewhere; and the statistics `advantage/*`."""
    estimated = zero_masked(estimated, mask)
    if settings.whitens:
        estimated, moments = _whitened(estimated, mask)
    else:
        moments = _centred(estimated, mask)[1]
    clipped, clip_fraction = clip_advantages(estimated, mask, settings.advantage_clip)
    return clipped, {
        "advantage/mean": moments.mean,
        "advantage/std": moments.std,
        "advantage/min": moments.low,
        "advantage/max": moments.high,
        "advantage/clip_fraction": clip_fraction,
    }
