"""Importance ratios between the current and the old policy, selected by `importance_sampling`.

Each function maps `(log_ratio, response_mask)`, both [B, T], to a ratio [B, T] that is 1 where masked.
`log_ratio` is `d_it = log_probs_it - old_log_probs_it`, computed by `clamped_log_ratio`: clamped to +-20 before any
`exp` (a clamped token has no gradient), and 0 where masked. A sample without valid tokens has ratio 1.
Equation numbers refer to the GSPO paper, arXiv 2507.18071.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

from roll_gspo.algorithms.masking import count_true, masked_difference
from roll_gspo.declarations import ImportanceRatio

MAX_LOG_RATIO = 20.0


def clamped_log_ratio(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """Return `d_it` [B, T] in +-20, exactly 0 (value and gradient) where masked. Masked inputs may hold anything."""
    difference = masked_difference(log_probs, old_log_probs, response_mask)
    return hardtanh(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)  # a clamp whose gradient is cheaper


@ImportanceRatio(name="token", scale="token", clip_range=(0.2, 0.27))
def token_ratio(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """`r_it = exp(d_it)`: PPO and GRPO (eq. 3)."""
    return log_ratio.exp()


@ImportanceRatio(name="seq", scale="sequence", clip_range=(3e-4, 4e-4), averages_advantages=True)
def sequence_ratio(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """`s_i = exp(sum_t m_it d_it / n_i)` (GSPO, eq. 7), repeated on every valid token of sample i."""
    lengths = count_true(response_mask).clamp(min=1)
    ratio_B1 = (log_ratio.sum(-1) / lengths).exp().unsqueeze(-1)
    return torch.where(response_mask, ratio_B1, 1.0)


@ImportanceRatio(name="seq_token", scale="sequence", clip_range=(3e-4, 4e-4))
def sequence_token_ratio(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """`s_it = sg[s_i] exp(log_probs_it - sg[log_probs_it])`: GSPO-token (eq. 14).

    Numerically `s_i`. The gradient goes through the token alone, so that advantages may differ within a sample.
    """
    sequence = sequence_ratio(log_ratio.detach(), response_mask)
    # exp(x - sg[x]) is 1 + (x - sg[x]) in value and gradient. The clamped difference stands for log_probs: the same
    # gradient, and none beyond the clamp, as in `seq`.
    return torch.addcmul(sequence, sequence, log_ratio - log_ratio.detach())


@ImportanceRatio(name="segment", scale="sequence", clip_range=(3e-4, 4e-4))
def segment_ratio(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """`sequence_ratio` of each contiguous run of the mask (one assistant turn)."""
    starts = torch.ones_like(response_mask)  # of runs, gaps included: their mean is 0 and their ratio 1
    starts[:, 1:] = response_mask[:, 1:] ^ response_mask[:, :-1]
    positions = starts.flatten().nonzero().squeeze(-1)
    return _RunMean.apply(log_ratio, positions.diff(append=positions.new_tensor([starts.numel()]))).exp()


class _RunMean(torch.autograd.Function):
    """Replace each position of [B, T], read row by row, by the mean of its run; `lengths` are those of the runs.

    The map is symmetric as a matrix, so that the gradient is the run means of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(lengths)
        return _run_means(values, lengths)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _run_means(gradient, *ctx.saved_tensors), None


def _run_means(values: Tensor, lengths: Tensor) -> Tensor:
    sums = torch.segment_reduce(values.flatten(), "sum", lengths=lengths, unsafe=True)
    return torch.repeat_interleave(sums / lengths, lengths, output_size=values.numel()).view(values.shape)
