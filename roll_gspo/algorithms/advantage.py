"""Advantages of a whole rollout from its rewards, in the order: normalise, clip, KL, estimate, whiten, clip.

Estimators that compare the samples of a prompt are part of the normalisation, so that the first clip follows them.

Legend: B samples of the rollout (all ranks), T response positions. Nothing here has a gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from roll_gspo.algorithms.advantage_estimators import AdvantageSettings, RewardParts, ShapedRewards
from roll_gspo.algorithms.kl import kl_estimate
from roll_gspo.algorithms.masking import zero_masked
from roll_gspo.algorithms.reward_norm import (
    RunningMoments,
    clip_rewards,
    groups_without_spread,
    normalise_rewards,
)
from roll_gspo.algorithms.turns import TokenTable, Turns
from roll_gspo.declarations import ADVANTAGE_ESTIMATORS

WHITENING_EPSILON = 1e-8


class Estimated(NamedTuple):
    """Advantages and returns of a rollout.

    Attributes:
        advantages: [B, T], 0 outside the loss mask.
        returns: [B, T] targets of the critic, 0 where masked; None without a critic.
        statistics: of rewards and advantages, see `advantages`.
    """

    advantages: Tensor
    returns: Tensor | None
    statistics: dict[str, float]


class TokenMoments(NamedTuple):
    """Count, mean, unbiased std (0 for fewer than two) and bounds of the valid tokens of [B, T]; 0 if undefined."""

    count: int = 0
    mean: float = 0.0
    std: float = 0.0
    low: float = 0.0
    high: float = 0.0


def _centred(values: Tensor, mask: Tensor) -> tuple[Tensor, TokenMoments]:
    """Return `values` [B, T] (0 where masked) minus the mean of the valid tokens, 0 where masked; and the moments."""
    lengths = mask.sum(-1)
    count = int(lengths.sum())
    if not count:
        return values, TokenMoments()
    # Fill masked positions with a valid token, so that the bounds are those of the valid tokens.
    row = int(lengths.argmax())
    example = float(values[row, int(mask[row].to(torch.uint8).argmax())])
    low, high = (float(bound) for bound in torch.where(mask, values, example).aminmax())
    # The mean of equal values must be exactly their value: whitening would amplify rounding noise.
    mean = low if low == high else float(values.sum(-1).sum(dtype=torch.float64)) / count
    centred = torch.where(mask, values - mean, 0.0)
    squares = float(centred.square().sum(-1).sum(dtype=torch.float64))
    return centred, TokenMoments(count, mean, math.sqrt(squares / max(count - 1, 1)), low, high)


def whiten(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Return [B, T] with zero mean and unit unbiased variance over the valid tokens, 0 where masked.

    Fewer than two valid tokens are unchanged. Equal advantages become 0.
    """
    return _whitened(zero_masked(advantages, response_mask), response_mask)[0]


def _whitened(values: Tensor, mask: Tensor) -> tuple[Tensor, TokenMoments]:
    """Whiten `values` that are 0 where masked; return the result and its moments."""
    centred, moments = _centred(values, mask)
    if moments.count < 2:
        return values, moments
    scale = moments.std + WHITENING_EPSILON
    low, high = (moments.low - moments.mean) / scale, (moments.high - moments.mean) / scale
    return centred.div_(scale), TokenMoments(moments.count, 0.0, moments.std / scale, low, high)


def clip_advantages(advantages: Tensor, response_mask: Tensor, advantage_clip: float | None) -> tuple[Tensor, float]:
    """Return [B, T] clamped to +-`advantage_clip` (None: unchanged), and the fraction of valid tokens beyond."""
    if advantage_clip is None:
        return advantages, 0.0
    count = max(int(response_mask.sum()), 1)
    beyond = int(((advantages.abs() > advantage_clip) & response_mask).sum())
    return advantages.clamp(-advantage_clip, advantage_clip), beyond / count


def _reward_statistics(scores: Tensor, group_ids: Tensor, rewards: Tensor) -> dict[str, float]:
    """Return mean, std, min and max of the scores [B], and the mean of the rewards [B]; 0 if undefined."""
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
    parts: RewardParts | None = None,
    turns: Turns | None = None,
) -> Estimated:
    """Return the advantages of a whole rollout, with returns and statistics.

    Args:
        scores: [B] from the reward workers.
        group_ids: [B] integers; samples of one prompt share one.
        response_mask: [B, T] bool.
        settings: from scores to advantages.
        log_probs, ref_log_probs: [B, T] of the sampling policy and the reference, for `add_token_level_kl`.
        kl_coef: coefficient from the KL controller, for `add_token_level_kl`.
        running: moments of the run, for `reward_norm: running`; they are updated with this rollout.
        values: [B, T] of the critic, for estimators that need one.
        loss_mask: [B, T] bool, the valid tokens of samples in the loss; None for `response_mask`. Other samples count
            in the moments of the rewards, but not in whitening and the statistics of the advantages.
        parts: of the scores, for estimators that normalise each part; None if the score is the only part.
        turns: of the samples, if `settings.needs_turns`; None if every sample has one turn.

    Returns:
        Advantages (0 outside `loss_mask`; float32, or float64 for float64 scores). Returns if the estimator needs a
        critic: advantages before whitening, plus values. Statistics: `reward/score_{mean,std,min,max}` (of `scores`),
        `reward/mean` (as the estimator gets them), `reward/clip_fraction`, `reward/groups_without_spread`,
        `advantage/{mean,std,min,max}` (before the clip), `advantage/clip_fraction` and, with `add_token_level_kl`,
        `reward/kl` (per valid token), with `credit: turn` those of `_turn_statistics`.

    Raises:
        ValueError: log-probs, values or moments that the settings need are missing.
    """
    declared = ADVANTAGE_ESTIMATORS.declaration(settings.adv_estimator)
    kl = _token_level_kl(log_probs, ref_log_probs, response_mask, settings)
    rows = _Rows(group_ids, response_mask, None if kl is None else kl_coef * kl, values, parts)
    found, of_turns = _found(scores, rows, turns, settings, running)
    statistics = _reward_statistics(scores, group_ids, found.rewards) | of_turns
    if kl is not None:
        statistics["reward/kl"] = float(kl.sum(-1).sum(dtype=torch.float64)) / max(int(response_mask.sum()), 1)
    statistics["reward/clip_fraction"] = found.clip_fraction
    returns = None
    if declared.needs_critic and values is not None:
        returns = zero_masked(found.advantages + values, response_mask)
    seen = response_mask if loss_mask is None else response_mask & loss_mask
    final, of_advantages = _finished(found.advantages, seen, settings)
    return Estimated(final, returns, statistics | of_advantages)


class _Rows(NamedTuple):
    """Inputs of an estimator beside the scores; see `ShapedRewards`."""

    group_ids: Tensor
    response_mask: Tensor
    penalties: Tensor | None = None
    values: Tensor | None = None
    parts: RewardParts | None = None


class _Found(NamedTuple):
    """Result of an estimator: advantages [B, T], the rewards that it got, and the fraction beyond `reward_clip`."""

    advantages: Tensor
    rewards: Tensor
    clip_fraction: float


def _found(
    scores: Tensor, rows: _Rows, turns: Turns | None, settings: AdvantageSettings, running: RunningMoments | None
) -> tuple[_Found, dict[str, float]]:
    """Estimate by episode or by turn, as `credit` says; the second also returns the statistics of turns."""
    if turns is None or settings.credit == "episode":
        earned = scores if turns is None else turns.discounted_sums(settings.step_reward_gamma)
        return _estimate(earned, rows, settings, running), {}
    tokens = turns.tokens(rows.response_mask)
    found = _estimate_turns(scores, rows, turns, tokens, settings, running)
    return found, _turn_statistics(turns, tokens, rows.group_ids, settings, found.advantages)


def _estimate(scores: Tensor, rows: _Rows, settings: AdvantageSettings, running: RunningMoments | None) -> _Found:
    """Normalise, clip and estimate; `scores` has one of each row."""
    compares = ADVANTAGE_ESTIMATORS.declaration(settings.adv_estimator).compares_group
    rewards, clip_fraction = _normalised(scores, rows.group_ids, settings, running, clips=not compares)
    shaped = ShapedRewards(rewards, rows.penalties, *rows[:2], rows.values, rows.parts)
    estimator = ADVANTAGE_ESTIMATORS.load(settings.adv_estimator)
    estimated = estimator(shaped, settings, **settings.adv_estimator_args).expand(rows.response_mask.shape)
    if compares:
        estimated, clip_fraction = _clip_estimated(estimated, rows.response_mask, settings.reward_clip)
    return _Found(estimated, rewards, clip_fraction)


def _estimate_turns(
    scores: Tensor,
    rows: _Rows,
    turns: Turns,
    tokens: TokenTable,
    settings: AdvantageSettings,
    running: RunningMoments | None,
) -> _Found:
    """Estimate an advantage per turn: `w_e` times that of the episode plus `w_s` times that of the turn's return.

    An estimator that needs a critic gets the samples, with the reward of each turn at its last token.
    """
    shape = rows.response_mask.shape
    groups = turns.groups(rows.group_ids, settings.turn_baseline)
    if ADVANTAGE_ESTIMATORS.declaration(settings.adv_estimator).needs_critic:
        rewards, clip_fraction = _normalised(turns.rewards, groups, settings, running, clips=True)
        placed = tokens.at_ends(rewards, shape)
        shaped = ShapedRewards(placed.sum(-1), rows.penalties, *rows[:2], rows.values, turn_rewards=placed)
        estimator = ADVANTAGE_ESTIMATORS.load(settings.adv_estimator)
        return _Found(estimator(shaped, settings, **settings.adv_estimator_args), rewards, clip_fraction)
    if rows.penalties is not None:
        raise ValueError("add_token_level_kl: the return of a turn has no KL; with credit: turn, use the KL loss")
    of_step = _estimate(turns.returns(settings.step_reward_gamma), _Rows(groups, tokens.mask), settings, running)
    spread = tokens.spread(of_step.advantages, shape)
    if settings.step_reward_weight != 1.0:
        spread = settings.step_reward_weight * spread
    if settings.episode_reward_weight:
        of_episode = _estimate(scores, rows._replace(parts=None), settings, running)
        spread = spread + settings.episode_reward_weight * of_episode.advantages
    return of_step._replace(advantages=spread)


def _turn_statistics(
    turns: Turns, tokens: TokenTable, group_ids: Tensor, settings: AdvantageSettings, estimated: Tensor
) -> dict[str, float]:
    """Return statistics of turns; 0 if there are none.

    * `reward/turn_mean`: mean of the rewards.
    * `reward/turn_groups_without_spread`: fraction of the sets of compared turns whose returns are all equal.
    * `advantage/turn_std`: root mean square, over turns, of the distance of a turn's mean advantage from the mean of
      its episode's turns.
    """
    if not len(turns.rewards):
        return dict.fromkeys(("reward/turn_mean", "reward/turn_groups_without_spread", "advantage/turn_std"), 0.0)
    groups = turns.groups(group_ids, settings.turn_baseline)
    zeros = torch.zeros(len(turns.rewards), dtype=torch.float64)
    means = zeros.index_add(0, tokens.owners, estimated[tokens.places].double()) / tokens.counts.clamp(min=1)
    episodes = torch.zeros(len(turns.of_tokens), dtype=torch.float64).index_add(0, turns.samples, means)
    distances = means - (episodes / torch.bincount(turns.samples, minlength=len(episodes)))[turns.samples]
    return {
        "reward/turn_mean": float(turns.rewards.double().mean()),
        "reward/turn_groups_without_spread": groups_without_spread(turns.returns(settings.step_reward_gamma), groups),
        "advantage/turn_std": float(distances.square().mean().sqrt()),
    }


def _normalised(
    scores: Tensor, group_ids: Tensor, settings: AdvantageSettings, running: RunningMoments | None, clips: bool
) -> tuple[Tensor, float]:
    """Return the normalised rewards [B], clipped if `clips`, and the fraction that was beyond the clip."""
    shift, scale = settings.reward_shift, settings.reward_scale
    rewards = normalise_rewards(scores, group_ids, settings.reward_norm, shift, scale, running)
    return clip_rewards(rewards, settings.reward_clip if clips else None)


def _token_level_kl(
    log_probs: Tensor | None, ref_log_probs: Tensor | None, mask: Tensor, settings: AdvantageSettings
) -> Tensor | None:
    """Return the divergence [B, T] from the reference with `add_token_level_kl`, else None."""
    if not settings.add_token_level_kl:
        return None
    if log_probs is None or ref_log_probs is None:
        raise ValueError("add_token_level_kl: log_probs or ref_log_probs missing; build the reference")
    return kl_estimate(log_probs, ref_log_probs, mask, settings.kl_penalty)


def _clip_estimated(estimated: Tensor, mask: Tensor, reward_clip: float | None) -> tuple[Tensor, float]:
    """Return [B, T] clamped to +-`reward_clip` (None: unchanged), and the fraction of samples with a token beyond."""
    if reward_clip is None or not len(estimated):
        return estimated, 0.0
    beyond = ((estimated.abs() > reward_clip) & mask).any(-1)
    return estimated.clamp(-reward_clip, reward_clip), float(beyond.double().mean())


def _finished(estimated: Tensor, mask: Tensor, settings: AdvantageSettings) -> tuple[Tensor, dict[str, float]]:
    """Whiten and clip over `mask`; return the result, 0 outside `mask`, and the statistics `advantage/*`."""
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
