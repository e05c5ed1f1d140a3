"""The policy losses per token, `policy_loss`: what the ratio and the advantage are made into before aggregation.

Every function maps `Terms` to the loss [B, T] and to [B, T] bool: where it took the gradient away or bounded a
weight, for the clip fractions. All tensors are [B, T]; masked positions hold ratio 1, log-probability and advantage 0.
`sg` stops the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.ratio import MAX_LOG_RATIO


@dataclass(frozen=True)
class Terms:
    """What a policy loss is made of.

    Attributes:
        log_probs: [B, T] of the current policy, with gradient.
        log_ratio: [B, T] of the tokens, clamped (`ratio.clamped_log_ratio`), with gradient.
        ratio: [B, T] at the level of `importance_sampling`, with gradient.
        advantages: [B, T].
        lengths: [B] int64, valid tokens.
        clip_low, clip_high: the ratio is bounded to `[1 - clip_low, 1 + clip_high]`.
        sapo_tau_positive, sapo_tau_negative: temperatures of SAPO's gate by the sign of the advantage.
    """

    log_probs: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    lengths: Tensor
    clip_low: float = 0.0
    clip_high: float = 0.0
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05


def clip(terms: Terms) -> tuple[Tensor, Tensor]:
    """`-min(ratio A, clip(ratio) A)` (PPO, arXiv 1707.06347 eq. 7; GSPO eq. 5, and eq. 13 with `seq_token`)."""
    return clipped_objective(terms.ratio, terms.advantages, terms.clip_low, terms.clip_high)


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """`-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`.

    Returns:
        The loss [B, T], and [B, T] bool: true where the clip takes the gradient away (`surr2 < surr1`).
    """
    minus = -advantages
    loss = ratio * minus
    bound = ratio.detach().clamp(1.0 - clip_low, 1.0 + clip_high).mul_(minus)
    clipped = bound > loss.detach()
    return torch.where(clipped, bound, loss), clipped


def dual_clip(loss: Tensor, advantages: Tensor, dual_clip_ratio: float) -> tuple[Tensor, Tensor]:
    """`min(loss, c |A|)` where `A < 0`, with `c = dual_clip_ratio` > 1 (arXiv 1912.09729).

    Returns:
        The loss [B, T], and [B, T] bool: true where the bound replaced it.
    """
    bound = -dual_clip_ratio * advantages
    bounded = (advantages < 0) & (loss.detach() > bound)
    return torch.where(bounded, bound, loss), bounded


def cispo(terms: Terms) -> tuple[Tensor, Tensor]:
    """`-sg[clip(ratio)] A log_prob` (MiniMax-M1, arXiv 2506.13585 eqs. 4 and 5): every token keeps a gradient.

    Counted as clipped: weights that the range bounds, where the advantage is not 0.
    """
    ratio = terms.ratio.detach()
    weight = ratio.clamp(1.0 - terms.clip_low, 1.0 + terms.clip_high)
    clipped = (weight - ratio).mul_(terms.advantages) != 0
    return weight.mul_(terms.advantages).neg_() * terms.log_probs, clipped


def gmpo(terms: Terms) -> tuple[Tensor, Tensor]:
    """`-A exp(sum_t c_it / n_i)`: minus the geometric mean of the clipped token ratios (arXiv 2507.20673 eq. 4).

    `c_it = min(d_it, log(1 + clip_high))` where `A > 0` and `max(d_it, log(1 - clip_low))` where `A < 0`: the
    one-sided clip of the paper, in log space. The sequence's mean is repeated on its tokens, so that
    `seq-mean-token-mean` gives the paper's objective; advantages that differ within a sample each multiply it.

    Counted as clipped: tokens whose ratio the clip holds, where the advantage is not 0.
    """
    log_ratio = terms.log_ratio
    lowest = math.log1p(-terms.clip_low) if terms.clip_low < 1 else -math.inf
    inside = log_ratio.detach().clamp(lowest, math.log1p(terms.clip_high))
    clipped = (inside - log_ratio.detach()).mul_(terms.advantages) < 0
    sums = torch.where(clipped, inside, log_ratio).sum(-1, keepdim=True)
    mean = (sums / terms.lengths.clamp(min=1)[:, None]).exp()
    return -mean * terms.advantages, clipped


def sapo(terms: Terms) -> tuple[Tensor, Tensor]:
    """`-(4 / tau) sigmoid(tau (ratio - 1)) A` (arXiv 2511.20347 eqs. 5 and 6): a soft gate instead of a clip.

    `tau` is `sapo_tau_positive` where `A > 0`, else `sapo_tau_negative`. Nothing is counted as clipped.
    """
    positive, advantages = terms.advantages > 0, terms.advantages
    tau = torch.where(positive, advantages.new_tensor(terms.sapo_tau_positive), terms.sapo_tau_negative)
    gate = torch.sigmoid(tau * (terms.ratio - 1.0))
    return gate * (-4.0 * advantages / tau), torch.zeros_like(positive)


def topr(terms: Terms) -> tuple[Tensor, Tensor]:
    """`-w A log_prob`: `w` is 1 where `A >= 0`, else `sg[min(exp(sum_t d_it), 1)]` (arXiv 2503.14286 eq. 8).

    The ratio is that of the whole response, as in the paper: a wrong answer that the policy has left behind no longer
    pushes. The paper's sum over a response is `seq-mean-token-sum`.

    Counted as clipped: the tokens of responses whose ratio 1 bounds.
    """
    whole = terms.log_ratio.detach().sum(-1, keepdim=True).clamp(min=-MAX_LOG_RATIO)
    negative = terms.advantages < 0
    weighted = torch.where(negative, whole.clamp(max=0.0).exp(), 1.0) * -terms.advantages
    return weighted * terms.log_probs, negative & (whole > 0)


POLICY_LOSSES: Mapping[str, Callable[[Terms], tuple[Tensor, Tensor]]] = {
    "clip": clip,
    "cispo": cispo,
    "gmpo": gmpo,
    "sapo": sapo,
    "topr": topr,
}
HAVE_A_CLIP_RANGE = ("clip", "cispo", "gmpo")
FORM_THEIR_OWN_RATIO = ("gmpo", "topr")  # of the whole response, from the token ratios
