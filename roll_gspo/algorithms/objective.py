"""Policy losses per token, selected by `policy_loss`: from ratio and advantage to a loss, before aggregation.

Each function maps `Terms` and `PolicyLossSettings` to the loss [B, T] and to a [B, T] bool: true where it removed the
gradient or bounded a weight, for the clip fractions. All tensors are [B, T]. Masked positions hold ratio 1, log-prob 0
and advantage 0. `sg` stops the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

from roll_gspo.algorithms.correction import CorrectionSettings
from roll_gspo.algorithms.ratio import MAX_LOG_RATIO
from roll_gspo.declarations import PolicyLoss


@dataclass(frozen=True)
class PolicyLossSettings:
    """Settings of the policy loss; fields have the names of their YAML keys, except the derived ones.

    Attributes:
        importance_sampling: a name in `IMPORTANCE_SAMPLINGS`, or the dotted path of a user's function.
        clip_low, clip_high: the ratio is clipped to `[1 - clip_low, 1 + clip_high]`; None if the loss needs no range.
        dual_clip_ratio: bound c > 1 of the dual clip, or None without one.
        loss_agg_mode: a name in `LOSS_AGG_MODES`.
        response_length: maximum response length in tokens.
        kl_loss_coef: coefficient of the KL term; 0 switches it off.
        kl_loss_type: a name in `KL_ESTIMATORS`.
        entropy_loss_coef: coefficient of the entropy bonus; 0 switches it off.
        policy_loss: a name in `POLICY_LOSSES`, or the dotted path of a user's function.
        pg_clip_length_scaling: divide the range by the square root of the response's length, in log space (see `clip`).
        sapo_tau_positive, sapo_tau_negative: temperatures of SAPO's gate by the sign of the advantage.
        vespo_k_positive, vespo_lambda_positive, vespo_k_negative, vespo_lambda_negative: exponent and decay of VESPO's
            weight by the sign of the advantage.
        dppo_divergence, dppo_threshold: divergence of DPPO's trust region (`tv` or `kl`), and its largest value.
        off_policy_mask_threshold: KL per token beyond which samples with negative advantage leave the policy loss, or
            None.
        correction: weights that correct the mismatch of trainer and generation engine, or None.
        policy_loss_args, importance_sampling_args: keyword arguments of a user's functions.
    """

    importance_sampling: str
    clip_low: float | None
    clip_high: float | None
    dual_clip_ratio: float | None
    loss_agg_mode: str
    response_length: int
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "k3"
    entropy_loss_coef: float = 0.0
    policy_loss: str = "clip"
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    pg_clip_length_scaling: bool = False
    vespo_k_positive: float = 2.0
    vespo_lambda_positive: float = 3.0
    vespo_k_negative: float = 3.0
    vespo_lambda_negative: float = 2.0
    dppo_divergence: str = "tv"
    dppo_threshold: float = 0.15
    off_policy_mask_threshold: float | None = None
    correction: CorrectionSettings | None = None
    policy_loss_args: Mapping[str, Any] = field(default_factory=dict)
    importance_sampling_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clip_range(self) -> tuple[float, float]:
        """(clip_low, clip_high) of a loss that declares `needs_clip_range`."""
        assert self.clip_low is not None and self.clip_high is not None  # the schema gives every such loss a range
        return self.clip_low, self.clip_high


@dataclass(frozen=True)
class Terms:
    """Inputs of a policy loss.

    Attributes:
        log_probs: [B, T] of the current policy, with gradient.
        log_ratio: [B, T] of the tokens, clamped (`ratio.clamped_log_ratio`), with gradient.
        ratio: [B, T] at the level of `importance_sampling`, with gradient.
        advantages: [B, T].
        response_mask: [B, T] bool, true on valid tokens.
        lengths: [B] int64, valid tokens per sample.
        ref_log_probs: [B, T] of the reference policy if the loss declares `needs_reference`, else None.
    """

    log_probs: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    response_mask: Tensor
    lengths: Tensor
    ref_log_probs: Tensor | None = None


@PolicyLoss(needs_clip_range=True, allows_dual_clip=True, reads=("pg_clip_length_scaling",))
def clip(terms: Terms, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """`-min(ratio A, clip(ratio) A)` (PPO, arXiv 1707.06347 eq. 7; GSPO eq. 5, and eq. 13 with `seq_token`).

    With `pg_clip_length_scaling`, the ratio `exp(S_i / n_i)` of a response is clipped to `exp(-clip_low / sqrt(n_i))`
    and `exp(clip_high / sqrt(n_i))`. The same responses are clipped as in `fspo`, whose band is that of `S_i`.
    """
    low, high = settings.clip_range
    if not settings.pg_clip_length_scaling:
        return clipped_objective(terms.ratio, terms.advantages, low, high)
    scale = terms.lengths.clamp(min=1).to(terms.ratio.dtype).rsqrt()[:, None]
    bounded = terms.ratio.detach().log().clamp(min=-low * scale, max=high * scale).exp()
    return _pessimistic(terms.ratio, bounded, terms.advantages)


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """`-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`.

    Returns:
        The loss [B, T], and [B, T] bool: true where the clip removes the gradient (`surr2 < surr1`).
    """
    return _pessimistic(ratio, ratio.detach().clamp(1.0 - clip_low, 1.0 + clip_high), advantages)


def _pessimistic(ratio: Tensor, bounded: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Return `-min(ratio A, bounded A)` [B, T], and where the bounded ratio (without gradient) decides."""
    minus = -advantages
    loss = ratio * minus
    bound = bounded * minus
    clipped = bound > loss.detach()
    return torch.where(clipped, bound, loss), clipped


def dual_clip(loss: Tensor, advantages: Tensor, dual_clip_ratio: float) -> tuple[Tensor, Tensor]:
    """`min(loss, c |A|)` if `A < 0`, with `c = dual_clip_ratio` > 1 (arXiv 1912.09729).

    Returns:
        The loss [B, T], and [B, T] bool: true where the bound replaced it.
    """
    bound = -dual_clip_ratio * advantages
    bounded = (advantages < 0) & (loss.detach() > bound)
    return torch.where(bounded, bound, loss), bounded


@PolicyLoss(needs_clip_range=True, clip_range=(1.0, 4.0), averages_advantages=False)
def cispo(terms: Terms, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """`-sg[clip(ratio)] A log_prob` (MiniMax-M1, arXiv 2506.13585 eqs. 4 and 5): every token keeps a gradient.

    Counted as clipped: weights that the range bounds, if the advantage is not 0.
    """
    low, high = settings.clip_range
    ratio = terms.ratio.detach()
    weight = ratio.clamp(1.0 - low, 1.0 + high)
    clipped = (weight - ratio).mul_(terms.advantages) != 0
    return weight.mul_(terms.advantages).neg_() * terms.log_probs, clipped


@PolicyLoss(
    needs_clip_range=True,
    clip_range=(0.3297, 0.4918),  # 1 - e^-0.4 and e^0.4 - 1
    own_ratio="the geometric mean of its clipped token ratios",
    averages_advantages=True,
)
def gmpo(terms: Terms, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """`-A exp(sum_t c_it / n_i)`: minus the geometric mean of the clipped token ratios (arXiv 2507.20673 eq. 4).

    `c_it = min(d_it, log(1 + clip_high))` if `A > 0`, `max(d_it, log(1 - clip_low))` if `A < 0`: the one-sided clip of
    the paper, in log space. The mean of the sequence is repeated on its tokens, so that `seq-mean-token-mean` gives the
    paper's objective. Advantages that differ within a sample each multiply that mean.

    Counted as clipped: tokens whose ratio the clip bounds, if the advantage is not 0.
    """
    low, high = settings.clip_range
    log_ratio = terms.log_ratio
    lowest = math.log1p(-low) if low < 1 else -math.inf
    inside = log_ratio.detach().clamp(lowest, math.log1p(high))
    clipped = (inside - log_ratio.detach()).mul_(terms.advantages) < 0
    sums = torch.where(clipped, inside, log_ratio).sum(-1, keepdim=True)
    mean = (sums / terms.lengths.clamp(min=1)[:, None]).exp()
    return -mean * terms.advantages, clipped


@PolicyLoss(reads=("sapo_tau_positive", "sapo_tau_negative"))
def sapo(terms: Terms, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """`-(4 / tau) sigmoid(tau (ratio - 1)) A` (arXiv 2511.20347 eqs. 5 and 6): a soft gate instead of a clip.

    `tau` is `sapo_tau_positive` if `A > 0`, else `sapo_tau_negative`. Nothing is counted as clipped.
    """
    positive, advantages = terms.advantages > 0, terms.advantages
    tau = torch.where(positive, advantages.new_tensor(settings.sapo_tau_positive), settings.sapo_tau_negative)
    gate = torch.sigmoid(tau * (terms.ratio - 1.0))
    return gate * (-4.0 * advantages / tau), torch.zeros_like(positive)


@PolicyLoss(own_ratio="the product of its token ratios")
def topr(terms: Terms, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """`-w A log_prob`: `w` is 1 if `A >= 0`, else `sg[min(exp(sum_t d_it), 1)]` (arXiv 2503.14286 eq. 8).

    The ratio is that of the whole response, as in the paper. A wrong answer that has become unlikely gets a small
    weight. The paper's sum over a response is `seq-mean-token-sum`.

    Counted as clipped: the tokens of responses whose ratio is bounded at 1.
    """
    whole = terms.log_ratio.detach().sum(-1, keepdim=True).clamp(min=-MAX_LOG_RATIO)
    negative = terms.advantages < 0
    weighted = torch.where(negative, whole.clamp(max=0.0).exp(), 1.0) * -terms.advantages
    return weighted * terms.log_probs, negative & (whole > 0)


@PolicyLoss(
    needs_clip_range=True,
    clip_range=(0.03, 0.03),
    own_ratio="the product of its token ratios",
    averages_advantages=True,
)
def fspo(terms: Terms, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """`-min(w A, exp(clip(S_i)) A)` with `S_i = sum_t d_it` and `w = exp(S_i)` (FSPO, arXiv 2509.09177 eqs. 3 to 5).

    The range is a band of the log-ratio of the response that grows with the square root of its length:
    `-clip_low sqrt(n_i)` to `clip_high sqrt(n_i)`. Long and short responses are then clipped equally often.
    """
    low, high = settings.clip_range
    width = terms.lengths.to(terms.log_ratio.dtype).sqrt()[:, None]
    whole = hardtanh(terms.log_ratio.sum(-1, keepdim=True), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    bounded = whole.detach().clamp(min=-low * width, max=high * width).exp()
    return _pessimistic(whole.exp(), bounded, terms.advantages)


@PolicyLoss(
    own_ratio="the product of its token ratios",
    reads=("vespo_k_positive", "vespo_lambda_positive", "vespo_k_negative", "vespo_lambda_negative"),
)
def vespo(terms: Terms, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """`-sg[w^k exp(lambda (1 - w))] A log_prob` with `w = exp(sum_t d_it)` (VESPO, arXiv 2602.10693, section 3.4).

    The weight is 1 on policy and falls smoothly to 0 as the response becomes unlikely or too likely, without a clip and
    without a mean over its length. `k` and `lambda` depend on the sign of the advantage. Nothing is counted as clipped.
    """
    positive = terms.advantages >= 0
    exponent = torch.where(positive, terms.advantages.new_tensor(settings.vespo_k_positive), settings.vespo_k_negative)
    decay = torch.where(
        positive, terms.advantages.new_tensor(settings.vespo_lambda_positive), settings.vespo_lambda_negative
    )
    whole = terms.log_ratio.detach().sum(-1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weight = (exponent * whole - decay * whole.expm1()).exp()
    return weight.mul_(terms.advantages).neg_() * terms.log_probs, torch.zeros_like(positive)


@PolicyLoss(reads=("dppo_divergence", "dppo_threshold"))
def dppo(terms: Terms, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """`-ratio A` for tokens within a trust region, 0 for the others (DPPO, arXiv 2602.04879, Binary-TV and Binary-KL).

    A token is outside if its probability has moved in the direction of its advantage, and the divergence of the two
    policies, with the vocabulary reduced to this token and all others, is above `dppo_threshold`. That is
    `|p - p_old|` (`tv`) or `p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))` (`kl`).

    Counted as clipped: the tokens outside.
    """
    log_probs = terms.log_probs.detach()
    new, old = log_probs.clamp(max=0.0), (log_probs - terms.log_ratio.detach()).clamp(max=0.0)
    moved = new.exp() - old.exp()
    divergence = moved.abs() if settings.dppo_divergence == "tv" else _binary_kl(old, new)
    outside = (moved * terms.advantages > 0) & (divergence > settings.dppo_threshold)
    return torch.where(outside, 0.0, -terms.ratio * terms.advantages), outside


def _binary_kl(old: Tensor, new: Tensor) -> Tensor:
    """Return KL(old || new) of the events "this token" and "another token" from the log-probs of this token."""
    others_old, others_new = -old.expm1(), -new.expm1()
    return old.exp() * (old - new) + torch.xlogy(others_old, others_old) - torch.xlogy(others_old, others_new)
