"""From shaped rewards to an advantage per token, one small function for each `adv_estimator`.

Legend: B samples of the rollout, T response positions, R_i the reward of sample i: normalised and clipped, minus the
token-level KL of its response where there is one. A group is the samples of one prompt. A sample without a valid
token has R_i = 0. Everything here is without gradient and holds anything where masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from roll_gspo.algorithms.discounted import discounted_returns, generalised_advantages
from roll_gspo.algorithms.masking import zero_masked
from roll_gspo.algorithms.reward_norm import normalise_rewards


@dataclass(frozen=True)
class ShapedRewards:
    """What an estimator sees of a rollout.

    Attributes:
        rewards: [B] normalised and clipped.
        penalties: [B, T] what the token-level KL takes from each token's reward, 0 where masked; None without.
        group_ids: [B] integers.
        response_mask: [B, T] bool.
        group_normalised: `reward_norm: group` has been at work.
        gamma: discount per valid token.
        lambd: of GAE.
        values: [B, T] of the critic, anything where masked; None without one.
    """

    rewards: Tensor
    penalties: Tensor | None
    group_ids: Tensor
    response_mask: Tensor
    group_normalised: bool = False
    gamma: float = 1.0
    lambd: float = 0.95
    values: Tensor | None = None

    @cached_property
    def lengths(self) -> Tensor:
        """[B] int64 n_i: the valid tokens of each sample."""
        return self.response_mask.sum(-1)

    @property
    def token_rewards(self) -> Tensor:
        """[B, T], see `token_rewards`."""
        return token_rewards(self.rewards, self.response_mask, self.penalties)

    @property
    def totals(self) -> Tensor:
        """[B] R_i: the sum of the token rewards."""
        totals = torch.where(self.lengths > 0, self.rewards, 0.0)
        return totals if self.penalties is None else totals - self.penalties.sum(-1)


def token_rewards(rewards: Tensor, response_mask: Tensor, penalties: Tensor | None = None) -> Tensor:
    """[B, T] the reward [B] at the last valid token, minus `penalties` [B, T] at every valid token.

    A sample without a valid token gets no reward.
    """
    if penalties is None:
        placed = torch.zeros(response_mask.shape, dtype=rewards.dtype, device=rewards.device)
    else:
        placed = -zero_masked(penalties, response_mask).to(rewards.dtype)
    width = response_mask.shape[1]
    if not width:
        return placed
    # Counting from 1, so that 0 is a sample without a valid token (masks may have holes).
    positions = torch.arange(1, width + 1, dtype=torch.int32, device=response_mask.device)
    last = response_mask.to(torch.int32).mul_(positions).amax(-1, keepdim=True).long()
    earned = torch.where(last > 0, rewards[:, None], 0.0)
    return placed.scatter_add_(1, (last - 1).clamp(min=0), earned)


# -> [B, T], or [B, 1] where the advantage is the same for every token of a sample
AdvantageEstimator = Callable[[ShapedRewards], Tensor]


def reinforce(shaped: ShapedRewards) -> Tensor:
    """Reward-to-go `G_t = r_t + gamma G_t+1`; only valid tokens discount, gaps of the mask do not."""
    if shaped.gamma == 1.0 and shaped.penalties is None:
        return shaped.totals[:, None]
    return discounted_returns(shaped.token_rewards, shaped.response_mask, shaped.gamma)


def grpo(shaped: ShapedRewards) -> Tensor:
    """R_i, normalised by its group, on every token (GSPO eq. 6; arXiv 2402.03300, 4.1.2).

    After `reward_norm: group` it is left alone: normalised once, in the form that `reward_shift` or
    `reward_scale` chose. After any other `reward_norm`, or none, it becomes `(r - mean) / (std + 1e-6)` of
    its group here; `reward_clip` has then clipped what came before.
    """
    totals = shaped.totals
    if not shaped.group_normalised:
        totals = normalise_rewards(totals, shaped.group_ids, "group")
    return totals[:, None]


def _distances(shaped: ShapedRewards) -> Tensor:
    """[B] R_i minus the mean of its group; exactly 0 where all are equal."""
    return normalise_rewards(shaped.totals, shaped.group_ids, "group", reward_shift=True)


def dr_grpo(shaped: ShapedRewards) -> Tensor:
    """R_i minus the mean of its group, on every token (arXiv 2503.20783, section 3.2)."""
    return _distances(shaped)[:, None]


def rloo(shaped: ShapedRewards) -> Tensor:
    """R_i minus the mean of the others of its group, on every token (arXiv 2402.14740, section 3.3).

    With n samples in the group that is n / (n - 1) times the distance from the group's mean; 0 in a group of one.
    """
    _, index, sizes = shaped.group_ids.unique(return_inverse=True, return_counts=True)
    distances = _distances(shaped)
    size = sizes[index].to(distances.dtype)
    return (distances * size / (size - 1).clamp(min=1))[:, None]


def reinforce_plus_plus(shaped: ShapedRewards) -> Tensor:
    """`reinforce`, whitened over the rollout afterwards (REINFORCE++, arXiv 2501.03262, section 3).

    The paper's form has `gamma: 1`, `add_token_level_kl: true` with `kl_penalty: kl` (k1) and no `reward_norm`:
    `A_t = r - beta sum_(i >= t) KL_i`, and (A - mean) / std over all valid tokens of the rollout.
    """
    return reinforce(shaped)


def reinforce_plus_plus_baseline(shaped: ShapedRewards) -> Tensor:
    """R_i minus the mean of its group on every token, whitened afterwards (REINFORCE++ with baseline, as above).

    The paper has its KL in the loss here (`use_kl_loss: true`, `kl_loss_type: mse`).
    """
    return dr_grpo(shaped)


def raft_plus_plus(shaped: ShapedRewards) -> Tensor:
    """1 on the tokens of a prompt's best samples, 0 on all others (RAFT++, arXiv 2504.11343, eq. 6).

    The paper's indicator `I{r(x, a) = max_i r(x, a_i)}`, and of those only positive samples, as RAFT's rejection
    sampling keeps them: a prompt whose answers are all wrong (best reward 0 or below) teaches nothing. Ties all
    train, each with 1. Best and positive are judged by the normalised reward without the KL: with no `reward_norm`
    the scores themselves, as in the paper; after `reward_norm: group` prompts answered all right are 0 too. A
    token-level KL lowers the 1 of the samples that train, by its sum over the response.
    """
    _, index = shaped.group_ids.unique(return_inverse=True)
    rewards = shaped.rewards
    best = rewards.new_zeros(len(rewards)).scatter_reduce(0, index, rewards, "amax", include_self=False)[index]
    trains = (rewards == best) & (best > 0)
    taken = 0.0 if shaped.penalties is None else shaped.penalties.sum(-1)
    return torch.where(trains, torch.ones_like(rewards) - taken, 0.0)[:, None]


def opo(shaped: ShapedRewards) -> Tensor:
    """R_i minus the length-weighted mean `sum_j n_j R_j / sum_j n_j` of its group (OPO, arXiv 2505.23585).

    The baseline of least gradient variance if squared gradient norms grow with the response's length. The paper
    trains strictly on-policy and without KL and entropy terms.
    """
    # The mean of distances from the plain mean: the same, and exactly 0 where all are equal.
    distances = _distances(shaped)
    ids, index = shaped.group_ids.unique(return_inverse=True)
    lengths = shaped.lengths.to(distances.dtype)
    zeros = distances.new_zeros(len(ids))
    weights = zeros.index_add(0, index, lengths).clamp(min=1)
    baselines = zeros.index_add(0, index, lengths * distances) / weights
    return (distances - baselines[index])[:, None]


def gae(shaped: ShapedRewards) -> Tensor:
    """Generalised advantage estimation over the critic's values (arXiv 1506.02438, eq. 16).

    Raises:
        ValueError: there are no values.
    """
    if shaped.values is None:
        raise ValueError("adv_estimator: 'gae' got no values; score the rollout with the critic")
    values = shaped.values.to(shaped.rewards.dtype)
    return generalised_advantages(shaped.token_rewards, values, shaped.response_mask, shaped.gamma, shaped.lambd)


ADVANTAGE_ESTIMATORS: Mapping[str, AdvantageEstimator] = {
    "reinforce": reinforce,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "raft_plus_plus": raft_plus_plus,
    "opo": opo,
    "gae": gae,
}

# Estimators that are whitened by their definition, whatever `whiten_advantages` says (never twice).
WHITENED_ESTIMATORS = frozenset({"reinforce_plus_plus", "reinforce_plus_plus_baseline"})
# Estimators that compare the samples of a group.
GROUP_ESTIMATORS = frozenset({"grpo", "dr_grpo", "rloo", "opo", "raft_plus_plus", "reinforce_plus_plus_baseline"})
# Estimators that need the critic's values, and make returns for it.
CRITIC_ESTIMATORS = frozenset({"gae"})
