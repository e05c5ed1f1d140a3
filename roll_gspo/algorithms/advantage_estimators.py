"""Advantage estimators, selected by `adv_estimator`: from shaped rewards to an advantage per token.

Legend: B samples of the rollout, T response positions, R_i the reward of sample i: normalised and clipped, minus the
token-level KL of its response if there is one. A group is the samples of one prompt. A sample without a valid token has
R_i = 0. Nothing here has a gradient. Masked positions of results may hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roll_gspo.algorithms.discounted import discounted_returns, generalised_advantages
from roll_gspo.algorithms.masking import zero_masked
from roll_gspo.algorithms.reward_norm import EPSILON, group_moments, normalise_rewards
from roll_gspo.declarations import ADVANTAGE_ESTIMATORS, AdvantageEstimator


@dataclass(frozen=True)
class AdvantageSettings:
    """Settings from scores to advantages; fields have the names of their YAML keys.

    Attributes:
        adv_estimator: a name in `ADVANTAGE_ESTIMATORS`, or the dotted path of a user's function.
        gamma: discount per valid token.
        reward_norm, reward_shift, reward_scale: see `normalise_rewards`.
        reward_clip: bound of the normalised reward, or None. It bounds the result of an estimator that compares groups.
        add_token_level_kl: subtract `kl_coef * kl` from the reward of every token.
        kl_penalty: estimator of that KL, a name in `KL_ESTIMATORS`.
        whiten_advantages: zero mean and unit variance over all valid tokens.
        advantage_clip: bound of the advantage, or None.
        lambd: lambda of GAE: 1 is reward-to-go minus value, 0 the one-step residual.
        adv_estimator_args: keyword arguments of a user's function.
        credit: `episode` gives all turns of an episode one advantage, `turn` gives each its own.
        step_reward_gamma: discount per turn of an episode.
        episode_reward_weight, step_reward_weight: weights of the advantages of episode and turn, for `credit: turn`.
        turn_baseline: the turns that a turn is compared with, see `Turns.groups`.
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
    adv_estimator_args: Mapping[str, Any] = field(default_factory=dict)
    credit: str = "episode"
    step_reward_gamma: float = 1.0
    episode_reward_weight: float = 0.0
    step_reward_weight: float = 1.0
    turn_baseline: str = "turn"

    @property
    def needs_turns(self) -> bool:
        """Return whether the turns of an episode count, and not only its score."""
        return self.credit == "turn" or self.step_reward_gamma != 1.0

    @property
    def whitens(self) -> bool:
        """Return whether advantages are whitened, by setting or by the estimator's definition."""
        return self.whiten_advantages or ADVANTAGE_ESTIMATORS.declaration(self.adv_estimator).whitens

    @property
    def compares_groups(self) -> bool:
        """Return whether a sample's advantage depends on the other samples of its prompt."""
        return ADVANTAGE_ESTIMATORS.declaration(self.adv_estimator).compares_group or self.reward_norm == "group"


class RewardParts(NamedTuple):
    """The parts of the scores.

    Attributes:
        scores: [B, K] of each part; a part that a prompt does not have is 0 in its whole group.
        weights: [K] of the parts in the score.
    """

    scores: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ShapedRewards:
    """Inputs of an advantage estimator.

    Attributes:
        rewards: [B] normalised as `reward_norm` says, and clipped unless the estimator compares groups.
        penalties: [B, T] token-level KL to subtract from each token's reward, 0 where masked; None without one.
        group_ids: [B] integers.
        response_mask: [B, T] bool.
        values: [B, T] of the critic, anything where masked; None without one.
        parts: of the scores, or None if the score is the only part.
        turn_rewards: [B, T] reward of each turn at its last token, 0 elsewhere, instead of `rewards` at the last token
            of the sample; None without it.
    """

    rewards: Tensor
    penalties: Tensor | None
    group_ids: Tensor
    response_mask: Tensor
    values: Tensor | None = None
    parts: RewardParts | None = None
    turn_rewards: Tensor | None = None

    @cached_property
    def lengths(self) -> Tensor:
        """[B] int64 n_i: valid tokens per sample."""
        return self.response_mask.sum(-1)

    @property
    def token_rewards(self) -> Tensor:
        """[B, T] reward of each token: `turn_rewards` minus the penalties, or by the function `token_rewards`."""
        if self.turn_rewards is not None:
            return self.turn_rewards if self.penalties is None else self.turn_rewards - self.penalties
        return token_rewards(self.rewards, self.response_mask, self.penalties)

    @property
    def totals(self) -> Tensor:
        """[B] R_i: the sum of the token rewards."""
        totals = torch.where(self.lengths > 0, self.rewards, 0.0)
        return totals if self.penalties is None else totals - self.penalties.sum(-1)


def token_rewards(rewards: Tensor, response_mask: Tensor, penalties: Tensor | None = None) -> Tensor:
    """Return [B, T]: the reward [B] at the last valid token, minus `penalties` [B, T] at every valid token.

    A sample without a valid token gets no reward.
    """
    if penalties is None:
        placed = torch.zeros(response_mask.shape, dtype=rewards.dtype, device=rewards.device)
    else:
        placed = -zero_masked(penalties, response_mask).to(rewards.dtype)
    width = response_mask.shape[1]
    if not width:
        return placed
    # Positions count from 1, so that 0 marks a sample without a valid token. Masks may have gaps.
    positions = torch.arange(1, width + 1, dtype=torch.int32, device=response_mask.device)
    last = response_mask.to(torch.int32).mul_(positions).amax(-1, keepdim=True).long()
    earned = torch.where(last > 0, rewards[:, None], 0.0)
    return placed.scatter_add_(1, (last - 1).clamp(min=0), earned)


@AdvantageEstimator(reads=("gamma",))
def reinforce(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """Reward-to-go `G_t = r_t + gamma G_t+1`. Only valid tokens discount; gaps of the mask do not."""
    if settings.gamma == 1.0 and shaped.penalties is None:
        return shaped.totals[:, None]
    return discounted_returns(shaped.token_rewards, shaped.response_mask, settings.gamma)


@AdvantageEstimator(compares_group=True)
def grpo(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """R_i, normalised by its group, on every token (GSPO eq. 6; arXiv 2402.03300, 4.1.2).

    With `reward_norm: group` the reward is unchanged: it is already normalised, as `reward_shift` and `reward_scale`
    choose. Otherwise it becomes `(r - mean) / (std + 1e-6)` of its group.
    """
    totals = shaped.totals
    if settings.reward_norm != "group":
        totals = normalise_rewards(totals, shaped.group_ids, "group")
    return totals[:, None]


def _distances(shaped: ShapedRewards) -> Tensor:
    """Return [B] R_i minus the mean of its group; exactly 0 if all are equal."""
    return normalise_rewards(shaped.totals, shaped.group_ids, "group", reward_shift=True)


@AdvantageEstimator(compares_group=True)
def dr_grpo(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """R_i minus the mean of its group, on every token (arXiv 2503.20783, section 3.2)."""
    return _distances(shaped)[:, None]


@AdvantageEstimator(compares_group=True)
def rloo(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """R_i minus the mean of the others of its group, on every token (arXiv 2402.14740, section 3.3).

    With n samples in the group this is n / (n - 1) times the distance from the group's mean; 0 in a group of one.
    """
    _, index, sizes = shaped.group_ids.unique(return_inverse=True, return_counts=True)
    distances = _distances(shaped)
    size = sizes[index].to(distances.dtype)
    return (distances * size / (size - 1).clamp(min=1))[:, None]


@AdvantageEstimator(whitens=True, reads=("gamma",))
def reinforce_plus_plus(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """`reinforce`, then whitened over the rollout (REINFORCE++, arXiv 2501.03262, section 3).

    The paper's form has `gamma: 1`, `add_token_level_kl: true` with `kl_penalty: kl` (k1) and no `reward_norm`:
    `A_t = r - beta sum_(i >= t) KL_i`, and (A - mean) / std over all valid tokens of the rollout.
    """
    return reinforce(shaped, settings)


@AdvantageEstimator(compares_group=True, whitens=True)
def reinforce_plus_plus_baseline(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """R_i minus the mean of its group on every token, then whitened (REINFORCE++ with baseline, same paper).

    The paper puts its KL into the loss here (`use_kl_loss: true`, `kl_loss_type: mse`).
    """
    return dr_grpo(shaped, settings)


@AdvantageEstimator(compares_group=True, whole_samples="trains the best samples of a prompt")
def raft_plus_plus(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """1 on the tokens of a prompt's best samples, 0 on all others (RAFT++, arXiv 2504.11343, eq. 6).

    The paper's indicator is `I{r(x, a) = max_i r(x, a_i)}`. Like RAFT's rejection sampling, this keeps only positive
    samples: a prompt whose best reward is 0 or below has advantage 0. Tied best samples all get 1. Best and positive
    refer to the normalised reward without the KL. Without `reward_norm` that is the score, as in the paper. With
    `reward_norm: group` a prompt whose answers are all right has advantage 0, too. A token-level KL reduces the 1 by
    its sum over the response.
    """
    _, index = shaped.group_ids.unique(return_inverse=True)
    rewards = shaped.rewards
    best = rewards.new_zeros(len(rewards)).scatter_reduce(0, index, rewards, "amax", include_self=False)[index]
    trains = (rewards == best) & (best > 0)
    taken = 0.0 if shaped.penalties is None else shaped.penalties.sum(-1)
    return torch.where(trains, torch.ones_like(rewards) - taken, 0.0)[:, None]


@AdvantageEstimator(compares_group=True)
def opo(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """R_i minus the length-weighted mean `sum_j n_j R_j / sum_j n_j` of its group (OPO, arXiv 2505.23585).

    This baseline has the least gradient variance if squared gradient norms grow with the response's length. The paper
    trains strictly on-policy, without KL and entropy terms.
    """
    # Weighting distances from the plain mean gives the same result, and exactly 0 if all rewards are equal.
    distances = _distances(shaped)
    ids, index = shaped.group_ids.unique(return_inverse=True)
    lengths = shaped.lengths.to(distances.dtype)
    zeros = distances.new_zeros(len(ids))
    weights = zeros.index_add(0, index, lengths).clamp(min=1)
    baselines = zeros.index_add(0, index, lengths * distances) / weights
    return (distances - baselines[index])[:, None]


@AdvantageEstimator(
    compares_group=True, normalises_scores=True, whole_samples="divides by the share of samples that succeed"
)
def maxrl(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """`(R_i - mean) / mean` of its group, on every token (MaxRL, arXiv 2602.02710, algorithm 1).

    With rewards of 0 and 1 the mean is the share of right answers, so that rare ones weigh more than in `grpo`. Rewards
    must not be negative: a group with a mean of 0 or below has advantage 0.
    """
    totals = shaped.totals.double()
    means = group_moments(totals, shaped.group_ids, None).mean
    relative = torch.where(means > EPSILON, (totals - means) / means.clamp(min=EPSILON), 0.0)
    return relative.to(shaped.totals.dtype)[:, None]


@AdvantageEstimator(
    compares_group=True, normalises_scores=True, whole_samples="normalises the parts of the score of a sample"
)
def gdpo(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """The weighted sum of the normalised parts of the reward, normalised over the rollout (GDPO, arXiv 2601.05242).

    Each part of a `weighted_sum` becomes `(r - mean) / (std + 1e-6)` of its group. The sum of weight times part becomes
    `(a - mean) / (std + 1e-6)` of all samples. Parts with a small range thus count as much as their weights say. A
    token-level KL reduces the result by its sum over the response.
    """
    scores, weights = shaped.parts or RewardParts(shaped.rewards[:, None], shaped.rewards.new_ones(1))
    summed = torch.zeros_like(shaped.rewards, dtype=torch.float64)
    for part, weight in zip(scores.double().unbind(-1), weights.tolist(), strict=True):
        summed += weight * normalise_rewards(part, shaped.group_ids, "group")
    result = normalise_rewards(summed, shaped.group_ids, "batch").to(shaped.rewards.dtype)
    return (result if shaped.penalties is None else result - shaped.penalties.sum(-1))[:, None]


@AdvantageEstimator(needs_critic=True, reads=("gamma", "lambd"))
def gae(shaped: ShapedRewards, settings: AdvantageSettings) -> Tensor:
    """Generalised advantage estimation over the critic's values (arXiv 1506.02438, eq. 16).

    Raises:
        ValueError: `shaped.values` is None.
    """
    if shaped.values is None:
        raise ValueError("adv_estimator: 'gae' got no values; score the rollout with the critic")
    values = shaped.values.to(shaped.rewards.dtype)
    return generalised_advantages(shaped.token_rewards, values, shaped.response_mask, settings.gamma, settings.lambd)
