"""Aggregation of token losses to one number (`loss_agg_mode`), with denominators of the whole mini-batch.

Each micro-batch returns its share: its partial sum over the global denominator. Shares add up to the same loss and
gradient for every micro-batch size, data-parallel size, padding and order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from roll_gspo.algorithms.masking import count_true, zero_masked


@dataclass(frozen=True)
class Denominators:
    """Denominators of a mini-batch, over all its micro-batches and ranks.

    Attributes:
        num_tokens: valid tokens.
        num_sequences: samples with at least one valid token.
    """

    num_tokens: int
    num_sequences: int

    @staticmethod
    def of(response_mask: Tensor) -> Denominators:
        """Count over `response_mask` [B, T] of the whole mini-batch."""
        return Denominators(int(response_mask.sum()), int(response_mask.any(-1).sum()))


# (sum over the valid tokens of each sample [B], n_i [B], denominators, response_length) -> shares [B]
AggregateFunction = Callable[[Tensor, Tensor, Denominators, int], Tensor]


def token_mean(sums: Tensor, lengths: Tensor, denominators: Denominators, response_length: int) -> Tensor:
    """`sum_t L_it / N_tok`."""
    return sums / max(denominators.num_tokens, 1)


def seq_mean_token_sum(sums: Tensor, lengths: Tensor, denominators: Denominators, response_length: int) -> Tensor:
    """`sum_t L_it / N_seq`."""
    return sums / max(denominators.num_sequences, 1)


def seq_mean_token_mean(sums: Tensor, lengths: Tensor, denominators: Denominators, response_length: int) -> Tensor:
    """`(sum_t L_it / n_i) / N_seq`: the aggregation of the GSPO paper (eqs. 5 and 13)."""
    return sums / lengths.clamp(min=1) / max(denominators.num_sequences, 1)


def seq_mean_token_sum_norm(sums: Tensor, lengths: Tensor, denominators: Denominators, response_length: int) -> Tensor:
    """`sum_t L_it / (N_seq response_length)`: a constant divisor instead of the padded width (arXiv 2503.20783)."""
    return sums / (max(denominators.num_sequences, 1) * response_length)


LOSS_AGG_MODES: Mapping[str, AggregateFunction] = {
    "token-mean": token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-mean": seq_mean_token_mean,
    "seq-mean-token-sum-norm": seq_mean_token_sum_norm,
}


def aggregate(
    token_values: Tensor,
    response_mask: Tensor,
    denominators: Denominators,
    loss_agg_mode: str,
    response_length: int,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Return this micro-batch's share (scalar) of the mini-batch's aggregated `token_values`.

    Args:
        token_values: [B, T], anything where masked.
        response_mask: [B, T] bool.
        denominators: of the whole mini-batch.
        loss_agg_mode: a name in `LOSS_AGG_MODES`.
        response_length: maximum response length in tokens; only `seq-mean-token-sum-norm` divides by it.
        sample_weights: [B] factors of the samples; they do not enter the denominators.
    """
    sums, lengths = zero_masked(token_values, response_mask).sum(-1), count_true(response_mask)
    return aggregate_sums(sums, lengths, denominators, loss_agg_mode, response_length, sample_weights)


def aggregate_sums(
    sums: Tensor,
    lengths: Tensor,
    denominators: Denominators,
    loss_agg_mode: str,
    response_length: int,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Aggregate samples by `sums` [B] over their valid tokens and their `lengths` [B]; otherwise as `aggregate`."""
    shares = LOSS_AGG_MODES[loss_agg_mode](sums, lengths, denominators, response_length)
    return shares.sum() if sample_weights is None else (shares * sample_weights).sum()
