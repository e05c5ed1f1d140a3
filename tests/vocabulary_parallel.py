"""Test inputs of `scores_from_hidden`, and its results with a vocabulary-parallel head."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from roll_gspo.strategies import fused_scores
from roll_gspo.strategies.fused_scores import scores_from_hidden

VOCAB, HIDDEN = 61, 12


class Head(NamedTuple):
    """Inputs of the scores of N tokens.

    Attributes:
        hidden: [N, H] hidden states.
        weight: [V, H] weight of the head.
        tokens: [N] token ids, including the first and the last row of the head.
        upstream: [2, N] upstream gradients of log-probs and entropies.
    """

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    upstream: Tensor

    @staticmethod
    def make(
        num_tokens: int, padded: int = VOCAB, dtype: torch.dtype = torch.float64, hidden_size: int = HIDDEN
    ) -> Head:
        """Return random inputs with logits of about ±10. Padding rows of the head are large, so that a leak shows."""
        generator = torch.Generator().manual_seed(num_tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden, weight, upstream = normal(num_tokens, hidden_size), normal(VOCAB, hidden_size), normal(2, num_tokens)
        weight = torch.cat([weight, 1e3 * normal(padded - VOCAB, hidden_size)])
        tokens = torch.randint(VOCAB, (num_tokens,), generator=generator)
        tokens[:2] = torch.tensor([0, VOCAB - 1])[:num_tokens]
        return Head(hidden.to(dtype), weight.to(dtype), tokens, upstream)


class Solution(NamedTuple):
    """Log-probs and entropies [N], and gradients of the hidden states [N, H] and of the head [V, H]."""

    log_probs: Tensor
    entropies: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def solution(log_probs: Tensor, entropies: Tensor, hidden: Tensor, weight: Tensor, upstream: Tensor) -> Solution:
    """Return log-probs and entropies with the gradients for the upstream gradients [2, N] of both."""
    d_hidden, d_weight = torch.autograd.grad((log_probs, entropies), (hidden, weight), tuple(upstream.to(log_probs)))
    return Solution(log_probs.detach(), entropies.detach(), d_hidden, d_weight)


def reference(head: Head, temperature: float) -> Solution:
    """Compute the solution with autograd in float64, without the padding rows."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (head.hidden, head.weight))
    log_p = (hidden @ weight[:VOCAB].t() / temperature).log_softmax(-1)
    chosen = log_p.gather(-1, head.tokens[:, None])[:, 0]
    return solution(chosen, -(log_p.exp() * log_p).sum(-1), hidden, weight, head.upstream)


def fused(head: Head, temperature: float, group: dist.ProcessGroup | None = None, first_row: int = 0) -> Solution:
    """Compute the solution with `scores_from_hidden`.

    Args:
        head: inputs; `weight` is the rank's shard of the head.
        temperature: sampling temperature.
        group: ranks that share the head.
        first_row: vocabulary row of the first row of `weight`.
    """
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (head.hidden, head.weight))
    log_probs, entropies = scores_from_hidden(
        hidden,
        weight,
        head.tokens,
        temperature=temperature,
        entropy=True,
        vocab_size=VOCAB,
        group=group,
        first_row=first_row,
    )
    assert entropies is not None
    return solution(log_probs, entropies, hidden, weight, head.upstream)


def solve_sharded(cases: list[tuple[int, int, float, int]]) -> list[Solution]:
    """Return this rank's solution of each case.

    Args:
        cases: (number of tokens, rows of the padded head, temperature, number of logits per block).
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    solutions, default = [], fused_scores._BLOCK_LOGITS
    try:
        for num_tokens, padded, temperature, fused_scores._BLOCK_LOGITS in cases:
            head = Head.make(num_tokens, padded)
            rows = padded // size
            shard = head._replace(weight=head.weight[rank * rows : (rank + 1) * rows])
            solutions.append(fused(shard, temperature, dist.group.WORLD, rank * rows))
    finally:
        fused_scores._BLOCK_LOGITS = default
    return solutions
