"""Normalisation and clipping of the scores of a rollout: `reward_{norm,shift,scale,clip}`.

Groups are defined by `group_ids` [B] alone: arbitrary integers in arbitrary order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6


class Moments(NamedTuple):
    """Mean and unbiased standard deviation for each sample, [B] float64 (or scalars)."""

    mean: Tensor
    std: Tensor


class RunningMoments:
    """Mean and variance of every finite score of the run (Welford; batches merged as in Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 before the second score."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def update(self, scores: Tensor) -> None:
        """Add the scores [B] of a rollout, except those that are not finite."""
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
        """Return the state for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state of `state_dict`."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


def group_moments(scores: Tensor, group_ids: Tensor, running: RunningMoments | None) -> Moments:
    """Return the moments of each sample's group; a group of one has std 0."""
    ids, index = group_ids.unique(return_inverse=True)
    zeros = scores.new_zeros(len(ids))
    sizes = zeros.index_add(0, index, torch.ones_like(scores))
    mean = zeros.index_add(0, index, scores) / sizes
    # Equal scores must have exactly their value as mean, and std 0: dividing by 1e-6 would amplify rounding noise.
    lowest = zeros.scatter_reduce(0, index, scores, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, scores, "amax", include_self=False)
    mean = torch.where(lowest == highest, lowest, mean)
    squares = zeros.index_add(0, index, (scores - mean[index]).square())
    std = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return Moments(mean[index], std[index])


def batch_moments(scores: Tensor, group_ids: Tensor, running: RunningMoments | None) -> Moments:
    """Return the moments of all samples of the rollout."""
    return group_moments(scores, torch.zeros_like(group_ids), running)


def running_moments(scores: Tensor, group_ids: Tensor, running: RunningMoments | None) -> Moments:
    """Return the moments of all samples of the run, after adding this rollout."""
    if running is None:
        raise ValueError("reward_norm: 'running' got no RunningMoments; pass the run's own")
    running.update(scores)
    return Moments(scores.new_tensor(running.mean), scores.new_tensor(running.std))


REWARD_NORMS: Mapping[str, Callable[[Tensor, Tensor, RunningMoments | None], Moments]] = {
    "group": group_moments,
    "batch": batch_moments,
    "running": running_moments,
}


def normalise_rewards(
    scores: Tensor,
    group_ids: Tensor,
    reward_norm: str | None,
    reward_shift: bool = False,
    reward_scale: bool = False,
    running: RunningMoments | None = None,
) -> Tensor:
    """Return `(r - mean) / (std + 1e-6)`, or `r - mean` (shift), or `r / (std + 1e-6)` (scale), or `r` (None).

    A group of one or of equal scores has std 0. It becomes 0, or with scale alone `r * 1e6`, which `reward_clip`
    bounds. `running` adds the rollout to the moments before it normalises.

    Args:
        scores: [B].
        group_ids: [B] integers.
        reward_norm: a name in `REWARD_NORMS`, or None.
        reward_shift, reward_scale: only subtract the mean, only divide by the deviation; not both.
        running: moments of the run, for `running`.

    Returns:
        [B], float32 or the wider dtype of `scores`.

    Raises:
        ValueError: `running` is needed and missing.
    """
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
    """Return `rewards` [B] clamped to +-`reward_clip` (None: unchanged), and the fraction that was beyond."""
    if reward_clip is None or not len(rewards):
        return rewards, 0.0
    return rewards.clamp(-reward_clip, reward_clip), float((rewards.abs() > reward_clip).double().mean())


def groups_without_spread(scores: Tensor, group_ids: Tensor) -> float:
    """Return the fraction of groups whose scores are all equal, groups of one included; GRPO gives them advantage 0."""
    ids, index = group_ids.unique(return_inverse=True)
    if not len(ids):
        return 0.0
    lowest = scores.new_zeros(len(ids)).scatter_reduce(0, index, scores, "amin", include_self=False)
    highest = scores.new_zeros(len(ids)).scatter_reduce(0, index, scores, "amax", include_self=False)
    return float((lowest == highest).double().mean())
