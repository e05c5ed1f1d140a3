"""Normalising and clipping the scores of a rollout: `reward_{norm,shift,scale,clip}`.

Samples belong together by `group_ids` [B] alone: arbitrary integers in arbitrary order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from roll_gspo.algorithms.choice import choose

EPSILON = 1e-6


class Moments(NamedTuple):
    """Mean and unbiased standard deviation that apply to each sample, [B] float64 (or scalars)."""

    mean: Tensor
    std: Tensor


class RunningMoments:
    """Mean and variance of every finite score seen so far (Welford; batches merged after Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        """Unbiased; 0 before the second score."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def update(self, scores: Tensor) -> None:
        """Take in the scores [B] of a rollout; those that are not finite would spoil the run and are left out."""
        values = scores.double()
        values = values[values.isfinite()]
        if not len(values):
            return
        mean = float(values.mean())
        difference, total = mean - self.mean, self.count + len(values)
        self.squares += float((values - mean).square().sum())
        self.squares += difference**2 * self.count * len(values) / total
        self.mean += difference * len(values) / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` gave."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


def group_moments(scores: Tensor, group_ids: Tensor, running: RunningMoments | None) -> Moments:
    """Of the samples that share a group; std 0 for a group of one."""
    ids, index = group_ids.unique(return_inverse=True)
    zeros = scores.new_zeros(len(ids))
    sizes = zeros.index_add(0, index, torch.ones_like(scores))
    mean = zeros.index_add(0, index, scores) / sizes
    # Equal scores must give exactly their value and std 0: rounding noise over 1e-6 would be a signal.
    lowest = zeros.scatter_reduce(0, index, scores, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, scores, "amax", include_self=False)
    mean = torch.where(lowest == highest, lowest, mean)
    squares = zeros.index_add(0, index, (scores - mean[index]).square())
    std = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return Moments(mean[index], std[index])


def batch_moments(scores: Tensor, group_ids: Tensor, running: RunningMoments | None) -> Moments:
    """Of all samples of the rollout: one group."""
    return group_moments(scores, torch.zeros_like(group_ids), running)


def running_moments(scores: Tensor, group_ids: Tensor, running: RunningMoments | None) -> Moments:
    """Of every sample of the run, this rollout included."""
    if running is None:
        raise ValueError("reward_norm: 'running' got no RunningMoments; pass the run's own")
    running.update(scores)
    return Moments(scores.new_tensor(running.mean), scores.new_tensor(running.std))


REWARD_NORMS: Mapping[str, Callable[[Tensor, Tensor, RunningMoments | None], Moments]] = {
    "group": group_moments,
    "batch": batch_moments,
    "running": running_moments,
}


def check_reward_norm(reward_norm: str | None, reward_shift: bool, reward_scale: bool) -> None:
    """Raise ValueError where the three contradict each other or `reward_norm` is unknown."""
    if reward_shift and reward_scale:
        raise ValueError("reward_shift and reward_scale are both true; leave both out for (r - mean) / std")
    if reward_norm is None:
        if reward_shift or reward_scale:
            raise ValueError("reward_shift or reward_scale without reward_norm; set group, batch or running")
        return
    choose(REWARD_NORMS, "reward_norm", reward_norm)


def normalise_rewards(
    scores: Tensor,
    group_ids: Tensor,
    reward_norm: str | None,
    reward_shift: bool = False,
    reward_scale: bool = False,
    running: RunningMoments | None = None,
) -> Tensor:
    """`(r - mean) / (std + 1e-6)`, or `r - mean` (shift), or `r / (std + 1e-6)` (scale); unchanged for None.

    A group of one or without spread has std 0: it gives 0 after the shift, and with scale alone `r * 1e6`,
    which `reward_clip` bounds. `running` takes the rollout in first, then normalises with the moments so far.

    Args:
        scores: [B].
        group_ids: [B] integers.
        reward_norm: a name in `REWARD_NORMS`, or None.
        reward_shift, reward_scale: only the mean, only the deviation.
        running: the run's moments, for `running`.

    Returns:
        [B], float32 or the wider dtype of `scores`.

    Raises:
        ValueError: the flags contradict each other, or `running` is needed and missing.
    """
    check_reward_norm(reward_norm, reward_shift, reward_scale)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if reward_norm is None:
        return scores.to(dtype)
    values = scores.double()
    mean, std = REWARD_NORMS[reward_norm](values, group_ids, running)
    if not reward_scale:
        values = values - mean
    if not reward_shift:
        values = values / (std + EPSILON)
    return values.to(dtype)


def clip_rewards(rewards: Tensor, reward_clip: float | None) -> tuple[Tensor, float]:
    """`rewards` [B] clamped to +-`reward_clip` (None: as they are), and the fraction that was beyond."""
    if reward_clip is None or not len(rewards):
        return rewards, 0.0
    return rewards.clamp(-reward_clip, reward_clip), float((rewards.abs() > reward_clip).double().mean())


def groups_without_spread(scores: Tensor, group_ids: Tensor) -> float:
    """Fraction of the groups whose scores are all equal (a group of one is): they train nothing in GRPO."""
    ids, index = group_ids.unique(return_inverse=True)
    if not len(ids):
        return 0.0
    lowest = scores.new_zeros(len(ids)).scatter_reduce(0, index, scores, "amin", include_self=False)
    highest = scores.new_zeros(len(ids)).scatter_reduce(0, index, scores, "amax", include_self=False)
    return float((lowest == highest).double().mean())
