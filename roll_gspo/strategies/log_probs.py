"""Log-probs and entropies of tokens from logits, with the memory of one chunk. All engines use it.

Legend: N tokens, V vocabulary; B samples, T response positions (see `roll_gspo.batch`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from roll_gspo.batch import Sequences, moved, pad_rows
from roll_gspo.strategies.base import TokenScores

# float32 working memory of a chunk is about four times this many logits
_CHUNK_LOGITS = 2**24


class _ChosenTokens(torch.autograd.Function):
    """(logits [N, V], tokens [N]) -> log-prob and entropy [N], float32.

    Keeps the logits and two numbers per token. The backward pass recomputes the softmax chunk by chunk, so no float32
    [N, V] tensor exists beside bfloat16 logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        log_totals, chosen, entropies = [], [], []
        for part, ids in _chunks(logits, tokens):
            scaled = part.float() / temperature
            log_total = scaled.logsumexp(-1)
            log_totals.append(log_total)
            chosen.append(scaled.gather(-1, ids[:, None])[:, 0] - log_total)
            if entropy:
                mean_logit = (scaled.softmax(-1) * scaled).sum(-1)
                entropies.append(log_total - mean_logit)
        log_total = torch.cat(log_totals)
        entropy_of = torch.cat(entropies) if entropy else torch.zeros_like(log_total)
        ctx.save_for_backward(logits, tokens, log_total, entropy_of)
        ctx.temperature, ctx.entropy = temperature, entropy
        return torch.cat(chosen), entropy_of

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, tokens, log_total, entropy_of = ctx.saved_tensors
        of_log_prob, of_entropy = gradients
        grad = torch.empty_like(logits)
        start = 0
        for part, ids in _chunks(logits, tokens):
            rows = slice(start, start + len(part))
            start += len(part)
            log_p = part.float() / ctx.temperature - log_total[rows, None]
            p = log_p.exp()
            d_logits = p * -of_log_prob[rows, None]
            d_logits.scatter_add_(-1, ids[:, None], of_log_prob[rows, None])
            if ctx.entropy:
                # dH/dz = -p (log p + H)
                d_logits -= p * (log_p + entropy_of[rows, None]) * of_entropy[rows, None]
            grad[rows] = (d_logits / ctx.temperature).to(grad.dtype)
        return grad, None, None, None


def _chunks(logits: Tensor, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK_LOGITS // logits.shape[-1])
    return list(zip(logits.split(size), tokens.split(size), strict=True))


def token_log_probs(
    logits: Tensor, tokens: Tensor, temperature: float, entropy: bool, vocab_size: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs of `tokens` under `softmax(logits / temperature)` and its entropies; differentiable.

    Args:
        logits: [N, V] in any floating dtype; the arithmetic is float32.
        tokens: [N] int64.
        temperature: above 0.
        entropy: compute the entropies.
        vocab_size: columns from this one on are padding and have no probability.

    Returns:
        Two [N] float32 tensors; the second is None unless `entropy`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: log-probabilities need a temperature above 0, not {temperature}")
    log_probs, entropies = _ChosenTokens.apply(logits[:, :vocab_size], tokens, temperature, entropy)
    return log_probs, entropies if entropy else None


def place(values: Tensor, places: tuple[Tensor, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Scatter values [N] to their samples and response positions, both [N], in a tensor [B, T]; 0 elsewhere."""
    placed = values.new_zeros(shape)
    placed[places] = values
    return placed


def score_in_micro_batches(
    sequences: Sequences, micro_batch_size: int, forward: Callable[[Sequences], TokenScores]
) -> TokenScores:
    """Score samples in trimmed micro-batches of similar length. The result is on the CPU, in the given order and width.

    Args:
        sequences: all samples.
        micro_batch_size: samples per micro-batch.
        forward: scores one micro-batch; the caller disables gradients.
    """
    width = sequences.response_mask.shape[1]
    order = sequences.lengths.argsort(stable=True)  # samples of similar length need the least padding
    parts = [forward(sequences.rows(index)) for index in order.split(micro_batch_size)]
    back = order.argsort().cpu()
    positions = sequences.input_ids.shape[1]
    entropies = [part.entropy for part in parts if part.entropy is not None]
    routes = [part.routed_experts for part in parts if part.routed_experts is not None]
    wholes = [pad_rows([part.log_probs for part in parts], width)]
    wholes += [pad_rows(entropies, width)] if entropies else []
    wholes += [pad_rows(routes, positions, fill=-1)] if routes else []
    found = iter([whole[back] for whole in moved(wholes, "cpu")])  # one wait for the device, after all passes
    return TokenScores(next(found), next(found) if entropies else None, next(found) if routes else None)
