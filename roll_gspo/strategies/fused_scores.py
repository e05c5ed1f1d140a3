"""Log-probabilities and entropies of tokens straight from hidden states and the output head; logits never exist whole.

The vocabulary is walked through in blocks that all tokens meet at once, not the tokens in chunks: then a rank needs one
collective however many blocks it has, and each row of the head's gradient is one matrix product over all tokens, so it
is accumulated in float32 within the product, rounded once, and written into the only [V, H] tensor there is.

Legend: N tokens, H hidden size, V vocabulary (V_local of it here), v rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Working memory is two or three times this many numbers, float32 (float64 for float64 inputs): what a CPU's cache
# holds; four times as much elsewhere, where a block has to outlast the launch of its kernels.
_BLOCK_LOGITS = 2**22


class _Options(NamedTuple):
    """Values common to all tokens; the first `num_rows` rows of the local head are real, the others are padding."""

    temperature: float
    entropy: bool
    first_row: int
    num_rows: int
    group: dist.ProcessGroup | None


class _Scores(torch.autograd.Function):
    """(hidden [N, H], weight [V_local, H], tokens [N]) -> log-probability and entropy (or None), both [N].

    Keeps its inputs and two numbers per token; the backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        largest, total, slope, chosen = _over_vocabulary(hidden, weight, tokens, options)
        log_total = total.log()
        log_probs = chosen - largest - log_total
        entropies = log_total - slope / total if options.entropy else None
        ctx.save_for_backward(hidden, weight, tokens, largest + log_total, entropies)
        ctx.options = options
        ctx.set_materialize_grads(False)  # an entropy that is only reported costs nothing in the backward pass
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, tokens, log_total, entropies = ctx.saved_tensors
        options: _Options = ctx.options
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden, dtype=log_total.dtype) if of_hidden else None
        d_weight = torch.empty_like(weight) if of_weight else None
        if d_weight is not None:
            d_weight[options.num_rows :] = 0
        # by the logits before they are divided by the temperature
        of_log_prob, of_entropy = (None if g is None else g / options.temperature for g in gradients)
        of_log_prob = torch.zeros_like(log_total) if of_log_prob is None else of_log_prob
        for rows, log_p in _blocks(hidden, weight, options):
            d_logits = _d_logits(log_p.sub_(log_total[:, None]), entropies, of_log_prob, of_entropy)
            inside, column = _columns(tokens, rows, options)
            d_logits.scatter_add_(1, column, torch.where(inside, of_log_prob[:, None], 0))
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                d_hidden += d_logits @ weight[rows]
            if d_weight is not None:
                torch.mm(d_logits.t(), hidden, out=d_weight[rows])
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None


def _d_logits(log_p: Tensor, entropies: Tensor | None, of_log_prob: Tensor, of_entropy: Tensor | None) -> Tensor:
    """[N, v] the gradient but for the chosen tokens' own share: -p (g + g_H (log p + H)); overwrites `log_p`."""
    if entropies is None or of_entropy is None:
        return log_p.exp_().mul_(-of_log_prob[:, None])
    p = log_p.exp()
    slope = log_p.add_(entropies[:, None]).mul_(-of_entropy[:, None]).sub_(of_log_prob[:, None])
    return slope.mul_(p)


def _over_vocabulary(hidden: Tensor, weight: Tensor, tokens: Tensor, options: _Options) -> Tensor:
    """[4, N] of the whole vocabulary: the largest logit m, sums of e^(z - m) and e^(z - m) (z - m), the chosen logit.

    A token that no rank has keeps -inf.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    merged = torch.zeros(4, len(tokens), dtype=dtype, device=hidden.device)
    merged[0] = torch.finfo(dtype).min  # finite, so that 0 terms of it sum to 0 and not to nan
    merged[3] = -torch.inf
    for rows, logits in _blocks(hidden, weight, options):
        inside, column = _columns(tokens, rows, options)
        chosen = torch.where(inside, logits.gather(1, column), -torch.inf)[:, 0]
        largest = logits.amax(-1)
        logits.sub_(largest[:, None])
        p = logits.exp()
        total = p.sum(-1)
        slope = p.mul_(logits).sum(-1) if options.entropy else torch.zeros_like(total)
        merged = _merge(torch.stack([merged, torch.stack([largest, total, slope, chosen])]))
    if options.group is None or not len(tokens):
        return merged
    parts = merged.new_empty(options.group.size(), *merged.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), merged, group=options.group)
    return _merge(parts)


def _merge(parts: Tensor) -> Tensor:
    """[4, N] of a vocabulary from [K, 4, N] of its K parts."""
    each_largest, total, slope, chosen = parts.unbind(1)
    largest = each_largest.amax(0)
    shift = each_largest - largest
    scale = shift.exp()
    return torch.stack(
        [largest, (scale * total).sum(0), (scale * (slope + shift * total)).sum(0), chosen.amax(0)],
    )


def _blocks(hidden: Tensor, weight: Tensor, options: _Options) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the head and the logits [N, v] that they give, divided by the temperature; float32 or float64."""
    block_logits = _BLOCK_LOGITS if hidden.device.type == "cpu" else 4 * _BLOCK_LOGITS
    size = max(1, block_logits // max(1, len(hidden)))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    for start in range(0, options.num_rows, size):
        rows = slice(start, min(start + size, options.num_rows))
        logits = (hidden @ weight[rows].t()).to(dtype)
        yield rows, logits if options.temperature == 1 else logits.div_(options.temperature)


def _columns(tokens: Tensor, rows: slice, options: _Options) -> tuple[Tensor, Tensor]:
    """[N, 1] whether a token lies in the block, and its column there (any where it does not)."""
    column = tokens[:, None] - (options.first_row + rows.start)
    width = rows.stop - rows.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)


def scores_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float,
    entropy: bool,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `tokens` under `softmax(hidden @ weight.T / temperature)` and its entropies, differentiable.

    Logits are computed in the inputs' dtype, everything from there on in float32 (float64 inputs: in float64).

    With a `group` every rank has the same `hidden` and `tokens` and gets the same, complete result; the loss must be
    computed from it alike on all ranks. The gradient of `weight` is complete, that of `hidden` is this rank's share:
    what flows through the rows of the head that are here. The caller's graph has to sum it over the group, as the
    backward pass of megatron's copy to, or sequence-parallel gather from, the tensor-parallel region does, put before.

    Args:
        hidden: [N, H]; N may be 0, on all ranks then.
        weight: [V_local, H] of the dtype of `hidden`.
        tokens: [N] int64; one outside of the vocabulary has the log-probability -inf.
        temperature: above 0.
        entropy: whether the entropies are wanted.
        vocab_size: rows of the whole head from here on only pad it and have no probability.
        group: over which the head's rows are cut; None: `weight` is the whole head.
        first_row: which row of the whole, padded head the first of `weight` is.

    Returns:
        Two [N] float32 tensors, the second None where not wanted.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: log-probabilities need a temperature above 0, not {temperature}")
    num_rows = min(max(vocab_size - first_row, 0), len(weight))
    return _Scores.apply(hidden, weight, tokens, _Options(temperature, entropy, first_row, num_rows, group))
