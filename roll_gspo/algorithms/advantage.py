"""Rewards to advantages of a whole rollout, in the order: normalise, clip, KL, estimate, whiten, clip.

Legend: B samples of the rollout (all ranks), T response positions. Everything here is without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class AdvantageSettings:
    """The choices between score and advantage.

    Attributes:
        adv_estimator: a name in `ADVANTAGE_ESTIMATORS`.
        gamma: discount per valid token of the reward-to-go; only `reinforce` uses it.
        reward_norm, reward_shift, reward_scale: see `normalise_rewards`.
        reward_clip: bound of the normalised reward, or None.
        add_token_level_kl: subtract `kl_coef * kl` from the reward of every token.
        kl_penalty: the estimator of that KL, a name in `KL_ESTIMATORS`.
        whiten_advantages: zero mean and unit variance over all valid tokens.
        advantage_clip: bound of the advantage, or None.

    Raises:
        ValueError: a name is unknown or the reward flags contradict each other.
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

    def __post_init__(self) -> None:
        choose(ADVANTAGE_ESTIMATORS, "adv_estimator", self.adv_estimator)
        choose(KL_ESTIMATORS, "kl_penalty", self.kl_penalty)
        check_reward_norm(self.reward_norm, self.reward_shift, self.reward_scale)


def token_rewards(rewards: Tensor, response_mask: Tensor, penalties: Tensor | None = None) -> Tensor:
    """[B, T] the reward [B] at the last valid token, minus `penalties` [B, T] at every valid token.

    A sample without a valid token gets no reward.
    """
    # The last valid token is the one whose count of valid tokens from there on is 1 (masks may have holes).
    remaining = response_mask.flip(-1).cumsum(-1).flip(-1)
    last = response_mask & (remaining == 1)
    placed = torch.where(last, rewards[:, None], torch.zeros_like(rewards[:, None]))
    return placed if penalties is None else placed - zero_masked(penalties, response_mask)


# (token rewards [B, T], group_ids [B], response_mask [B, T], settings) -> [B, T], anything where masked
AdvantageEstimator = Callable[[Tensor, Tensor, Tensor, AdvantageSettings], Tensor]


def reinforce(rewards: Tensor, group_ids: Tensor, response_mask: Tensor, settings: AdvantageSettings) -> Tensor:
    """Reward-to-go `G_t = r_t + gamma G_t+1`; only valid tokens discount, gaps of the mask do not."""
    if settings.gamma == 1.0:
        return rewards.flip(-1).cumsum(-1).flip(-1)
    returns = torch.empty_like(rewards)
    following = rewards.new_zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = torch.where(response_mask[:, t], rewards[:, t] + settings.gamma * following, following)
        returns[:, t] = following
    return returns


def grpo(rewards: Tensor, group_ids: Tensor, response_mask: Tensor, settings: AdvantageSettings) -> Tensor:
    """The sample's reward, normalised by its group, on every token (GSPO eq. 6; arXiv 2402.03300, 4.1.2).

    The sample's reward is the sum of its token rewards: clipped reward minus the KL of the whole response.
    After `reward_norm: group` it is left alone: normalised once, in the form that `reward_shift` or
    `reward_scale` chose. After any other `reward_norm`, or none, it becomes `(r - mean) / (std + 1e-6)` of
    its group here; `reward_clip` has then clipped what came before.
    """
    totals = rewards.sum(-1)
    if settings.reward_norm != "group":
        totals = normalise_rewards(totals, group_ids, "group")
    return totals[:, None].expand_as(rewards)


def dr_grpo(rewards: Tensor, group_ids: Tensor, response_mask: Tensor, settings: AdvantageSettings) -> Tensor:
    """The sample's reward minus the mean of its group, on every token (arXiv 2503.20783, section 3.2)."""
    totals = rewards.sum(-1)
    return normalise_rewards(totals, group_ids, "group", reward_shift=True)[:, None].expand_as(rewards)


def rloo(rewards: Tensor, group_ids: Tensor, response_mask: Tensor, settings: AdvantageSettings) -> Tensor:
    """The sample's reward minus the mean of the others of its group, on every token (arXiv 2402.14740, section 3.3).

    With n samples in the group that is n / (n - 1) times the distance from the group's mean; 0 in a group of one.
    """
    totals = rewards.sum(-1)
    _, index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    size = sizes[index].to(totals.dtype)
    distance = normalise_rewards(totals, group_ids, "group", reward_shift=True)
    return (distance * size / (size - 1).clamp(min=1))[:, None].expand_as(rewards)


ADVANTAGE_ESTIMATORS: Mapping[str, AdvantageEstimator] = {
    "reinforce": reinforce,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
}


def whiten(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Zero mean and unit unbiased variance over the valid tokens of [B, T]; 0 where masked.

    Fewer than two valid tokens are left as they are; equal advantages become 0.
    """
    valid = advantages[response_mask].double()
    if len(valid) < 2:
        return zero_masked(advantages, response_mask)
    if bool((valid == valid[0]).all()):
        return torch.zeros_like(advantages)
    whitened = (advantages.double() - valid.mean()) / (valid.std() + 1e-8)
    return zero_masked(whitened, response_mask).to(advantages.dtype)


def clip_advantages(advantages: Tensor, response_mask: Tensor, advantage_clip: float | None) -> tuple[Tensor, float]:
    """[B, T] clamped to +-`advantage_clip` (None: as they are), and the fraction of valid tokens beyond."""
    if advantage_clip is None or not bool(response_mask.any()):
        return advantages, 0.0
    beyond = float((advantages[response_mask].abs() > advantage_clip).double().mean())
    return advantages.clamp(-advantage_clip, advantage_clip), beyond


def _summary(prefix: str, values: Tensor) -> dict[str, float]:
    """Mean, std, min and max of a flat tensor; zeros of an empty one, std 0 of a single value."""
    flat = values.double() if len(values) else values.new_zeros(1).double()
    std = float(flat.std()) if len(flat) > 1 else 0.0
    return {
        f"{prefix}mean": float(flat.mean()),
        f"{prefix}std": std,
        f"{prefix}min": float(flat.min()),
        f"{prefix}max": float(flat.max()),
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
) -> tuple[Tensor, dict[str, float]]:
    """Advantages of a whole rollout and what they were made of.

    Args:
        scores: [B] of the reward workers.
        group_ids: [B] integers; samples of one prompt share one.
        response_mask: [B, T] bool.
        settings: the choices.
        log_probs, ref_log_probs: [B, T] of the sampling policy and the reference, for `add_token_level_kl`.
        kl_coef: of the KL controller, for `add_token_level_kl`.
        running: the run's moments, for `reward_norm: running`; this rollout is taken in.

    Returns:
        [B, T] (0 where masked; float32, or float64 for float64 scores), and the statistics
        `reward/score_{mean,std,min,max}` (as given), `reward/mean` (normalised and clipped),
        `reward/clip_fraction`, `reward/groups_without_spread`, `advantage/{mean,std,min,max}` (valid tokens,
        before the clip), `advantage/clip_fraction` and, with `add_token_level_kl`, `reward/kl` (per valid
        token; what the controller is told).

    Raises:
        ValueError: log-probabilities or moments that the settings need are missing.
    """
    rewards = normalise_rewards(
        scores, group_ids, settings.reward_norm, settings.reward_shift, settings.reward_scale, running
    )
    rewards, reward_clip_fraction = clip_rewards(rewards, settings.reward_clip)
    statistics = _summary("reward/score_", scores)
    statistics["reward/mean"] = float(rewards.double().mean()) if len(rewards) else 0.0
    statistics["reward/clip_fraction"] = reward_clip_fraction
    statistics["reward/groups_without_spread"] = groups_without_spread(scores, group_ids)

    penalties = None
    if settings.add_token_level_kl:
        if log_probs is None or ref_log_probs is None:
            raise ValueError("add_token_level_kl: log_probs or ref_log_probs missing; build the reference")
        kl = kl_estimate(log_probs, ref_log_probs, response_mask, settings.kl_penalty)
        statistics["reward/kl"] = float(kl.double().sum() / response_mask.sum().clamp(min=1))
        penalties = kl_coef * kl
    per_token = token_rewards(rewards, response_mask, penalties)

    estimated = ADVANTAGE_ESTIMATORS[settings.adv_estimator](per_token, group_ids, response_mask, settings)
    estimated = zero_masked(estimated, response_mask)
    if settings.whiten_advantages:
        estimated = whiten(estimated, response_mask)
    statistics |= _summary("advantage/", estimated[response_mask])
    clipped, fraction = clip_advantages(estimated, response_mask, settings.advantage_clip)
    statistics["advantage/clip_fraction"] = fraction
    return clipped, statistics
