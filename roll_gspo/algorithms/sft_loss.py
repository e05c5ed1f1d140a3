"""The loss of supervised fine-tuning: how surprised the model is by the tokens that it is to imitate."""

from __future__ import annotations

import torch
from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators, aggregate
from roll_gspo.algorithms.masking import zero_masked
from roll_gspo.metrics import Metric


def sft_loss(log_probs: Tensor, response_mask: Tensor, denominators: Denominators) -> tuple[Tensor, dict[str, Metric]]:
    """This micro-batch's share of `-sum log pi(y_t | y_<t) / N_tok`: the mean over all tokens of the mini-batch.

    Every token counts the same, whichever sample it is in, so that shares of micro-batches and ranks of any size add up
    to one loss and one gradient. Half precision is computed in float32.

    Args:
        log_probs: [B, T] of the tokens to imitate, with gradient; anything where masked.
        response_mask: [B, T] bool, true on the tokens to imitate; gaps are harmless.
        denominators: of the whole mini-batch.

    Returns:
        The scalar loss in nats a token, and metrics without gradient: `sft/loss` and `sft/num_tokens` are shares.
    """
    share = aggregate(-log_probs, response_mask, denominators, "token-mean", response_length=1)
    one = torch.ones_like(share)
    return share, {
        "sft/loss": Metric(share.detach(), one, "sum"),
        "sft/num_tokens": Metric(response_mask.sum(), one, "sum"),
    }


@torch.no_grad()
def negative_log_likelihood(log_probs: Tensor, response_mask: Tensor) -> tuple[float, int]:
    """(sum of `-log pi` over the valid tokens, in float64; how many they are) of `log_probs` [B, T]."""
    return -float(zero_masked(log_probs, response_mask).double().sum()), int(response_mask.sum())
