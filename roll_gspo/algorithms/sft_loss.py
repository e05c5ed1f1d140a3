"""The loss of supervised fine-tuning: the mean negative log-likelihood of the target tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators, aggregate
from roll_gspo.algorithms.masking import zero_masked
from roll_gspo.metrics import Metric


def sft_loss(log_probs: Tensor, response_mask: Tensor, denominators: Denominators) -> tuple[Tensor, dict[str, Metric]]:
    """Return this micro-batch's share of `-sum log pi(y_t | y_<t) / N_tok`, the mean over all tokens of the mini-batch.

    Every token has the same weight in every sample, so that shares of micro-batches and ranks of any size add up to the
    same loss and gradient. Half precision is computed in float32.

    Args:
        log_probs: [B, T] of the target tokens, with gradient; anything where masked.
        response_mask: [B, T] bool, true on target tokens; it may have gaps.
        denominators: of the whole mini-batch.

    Returns:
        The scalar loss in nats per token, and metrics without gradient: `sft/loss` and `sft/num_tokens` are shares.
    """
    share = aggregate(-log_probs, response_mask, denominators, "token-mean", response_length=1)
    one = torch.ones_like(share)
    return share, {
        "sft/loss": Metric(share.detach(), one, "sum"),
        "sft/num_tokens": Metric(response_mask.sum(), one, "sum"),
    }


@torch.no_grad()
def negative_log_likelihood(log_probs: Tensor, response_mask: Tensor) -> tuple[float, int]:
    """Return the sum of `-log pi` over the valid tokens of `log_probs` [B, T], in float64, and their number."""
    return -float(zero_masked(log_probs, response_mask).double().sum()), int(response_mask.sum())
