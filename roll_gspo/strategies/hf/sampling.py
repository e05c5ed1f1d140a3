"""Sampling of tokens from logits: temperature, top-k, top-p, and one uniform number per token.

Legend: B rows that are decoded together, V vocabulary, L longest response.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roll_gspo.strategies.base import Sampling


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Return [B, L] float64 in [0, 1). Row i depends only on seed i, so a sample does not depend on its neighbours."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def sampling_log_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return [B, V] float32 log-probs of the sampled distribution; -inf for truncated tokens.

    Temperature is applied first, then top-k, then top-p on the rest. Greedy decoding gets the plain `log_softmax`.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.log_softmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        # a token stays while the ones before it hold less than top_p; the first always stays
        dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        dropped[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)
    return logits.log_softmax(-1)


def draw(log_probs: Tensor, uniform: Tensor, greedy: bool) -> Tensor:
    """Return [B] token ids: the first whose cumulative probability exceeds the uniform number, or the most probable."""
    if greedy:
        return log_probs.argmax(-1)
    cumulated = log_probs.double().exp().cumsum(-1)
    target = uniform.to(cumulated.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=cumulated.shape[-1] - 1)
