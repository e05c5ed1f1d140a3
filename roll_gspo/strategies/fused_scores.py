"""Log-probs and entropies of tokens from hidden states and the output head, without a full logits tensor.

The outer loop runs over blocks of the vocabulary, not over chunks of tokens. A rank then needs one collective for any
number of blocks. Each row of the head's gradient is one matrix product over all tokens: accumulated in float32, rounded
once, and written into the only [V, H] tensor.

Two kernels compute the sums over the vocabulary and the gradients of the logits: torch operations on blocks of logits
(here), and Triton (`fused_scores_triton.py`), which keeps logits in registers. Everything else is common.

Legend: N tokens, H hidden size, V vocabulary (V_local of it on this rank), v rows of a block.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from roll_gspo.strategies.head_products import SIXTEEN_BITS, largest_block, product, uses_float32

FusedHead = Literal["auto", "torch", "triton"]

# Working memory is two to three times this many numbers in float32 (float64 for float64 inputs). It fits a CPU's cache;
# four times as much elsewhere, where a block has to outlast the launch of its kernels.
_BLOCK_LOGITS = 2**22
# Gradients of logits that the Triton kernel writes at a time: 128 MiB in 16 bits.
_BLOCK_GRADIENTS = 2**26


class _Options(NamedTuple):
    """Values common to all tokens.

    Only the first `num_rows` rows of the local head are real; the others are padding. `float32` keeps the logits of
    16-bit factors in float32; `triton` selects the kernel.
    """

    temperature: float
    entropy: bool
    first_row: int
    num_rows: int
    group: dist.ProcessGroup | None
    float32: bool
    triton: bool


class _Scores(torch.autograd.Function):
    """(hidden [N, H], weight [V_local, H], tokens [N]) -> log-probability and entropy (or None), both [N].

    Keeps its inputs and two numbers per token; the backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        sums = _triton_sums if options.triton else _torch_sums
        largest, total, slope, chosen = _over_ranks(sums(hidden, weight, tokens, options), options)
        log_total = total.log()
        log_probs = chosen - largest - log_total
        entropies = log_total - slope / total if options.entropy else None
        ctx.save_for_backward(hidden, weight, tokens, largest + log_total, entropies)
        ctx.options = options
        ctx.set_materialize_grads(False)  # an entropy that is only reported needs no backward pass
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
        # with respect to the logits before the division by the temperature
        of_log_prob, of_entropy = (None if g is None else g / options.temperature for g in gradients)
        of_log_prob = torch.zeros_like(log_total) if of_log_prob is None else of_log_prob
        entropies = None if of_entropy is None else entropies
        upstream = _Upstream(log_total, of_log_prob, entropies, of_entropy)
        gradients_of_blocks = _triton_d_logits if options.triton else _torch_d_logits
        for rows, d_logits in gradients_of_blocks(hidden, weight, tokens, upstream, options):
            if d_hidden is not None:
                d_hidden += product(d_logits, weight[rows], options.float32)
            if d_weight is not None:
                torch.mm(d_logits.t(), hidden, out=d_weight[rows])
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None


class _Upstream(NamedTuple):
    """Values per token [N] that determine the gradients of logits; the last two only if the entropy has a gradient."""

    log_total: Tensor
    of_log_prob: Tensor
    entropies: Tensor | None
    of_entropy: Tensor | None


def _torch_d_logits(
    hidden: Tensor, weight: Tensor, tokens: Tensor, upstream: _Upstream, options: _Options
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of the head and the gradients of their logits [N, v] in the dtype of the head."""
    for rows, log_p in _blocks(hidden, weight, options):
        d_logits = _d_logits(log_p.sub_(upstream.log_total[:, None]), upstream)
        inside, column = _columns(tokens, rows, options)
        d_logits.scatter_add_(1, column, torch.where(inside, upstream.of_log_prob[:, None], 0))
        yield rows, d_logits.to(weight.dtype)


def _d_logits(log_p: Tensor, upstream: _Upstream) -> Tensor:
    """Return [N, v], the gradient without the chosen tokens: -p (g + g_H (log p + H)). Overwrites `log_p`."""
    of_log_prob, entropies, of_entropy = upstream[1:]
    if entropies is None or of_entropy is None:
        return log_p.exp_().mul_(-of_log_prob[:, None])
    p = log_p.exp()
    slope = log_p.add_(entropies[:, None]).mul_(-of_entropy[:, None]).sub_(of_log_prob[:, None])
    return slope.mul_(p)


def _triton_d_logits(
    hidden: Tensor, weight: Tensor, tokens: Tensor, upstream: _Upstream, options: _Options
) -> Iterator[tuple[slice, Tensor]]:
    """Yield what `_torch_d_logits` yields, in larger blocks."""
    from roll_gspo.strategies.fused_scores_triton import gradients_of_logits

    hidden, size = hidden.contiguous(), max(1, _BLOCK_GRADIENTS // max(1, len(hidden)))
    for start in range(0, options.num_rows, size):
        rows = slice(start, min(start + size, options.num_rows))
        yield (
            rows,
            gradients_of_logits(
                hidden,
                weight[rows].contiguous(),
                tokens - (options.first_row + start),
                *upstream,
                temperature=options.temperature,
                rounded=not options.float32,
            ),
        )


def _triton_sums(hidden: Tensor, weight: Tensor, tokens: Tensor, options: _Options) -> Tensor:
    """Return what `_torch_sums` returns."""
    from roll_gspo.strategies.fused_scores_triton import sums_of_blocks

    parts = sums_of_blocks(
        hidden.contiguous(),
        weight[: options.num_rows].contiguous(),
        tokens - options.first_row,
        temperature=options.temperature,
        entropy=options.entropy,
        rounded=not options.float32,
    )
    return _merge(torch.cat([_sums_of_nothing(hidden)[None], parts]))


def _sums_of_nothing(hidden: Tensor) -> Tensor:
    """Return the sums of `_torch_sums` over no row of the head."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.zeros(4, len(hidden), dtype=dtype, device=hidden.device)
    sums[0] = torch.finfo(dtype).min  # finite, so that a sum of zero terms is 0 and not nan
    sums[3] = -torch.inf
    return sums


def _torch_sums(hidden: Tensor, weight: Tensor, tokens: Tensor, options: _Options) -> Tensor:
    """Return [4, N] of this rank: maximum logit m, sums of e^(z - m) and e^(z - m) (z - m), chosen logit.

    The chosen logit of a token that this rank does not have stays -inf.
    """
    merged = _sums_of_nothing(hidden)
    for rows, logits in _blocks(hidden, weight, options):
        inside, column = _columns(tokens, rows, options)
        chosen = torch.where(inside, logits.gather(1, column), -torch.inf)[:, 0]
        largest = logits.amax(-1)
        logits.sub_(largest[:, None])
        p = logits.exp()
        total = p.sum(-1)
        slope = p.mul_(logits).sum(-1) if options.entropy else torch.zeros_like(total)
        merged = _merge(torch.stack([merged, torch.stack([largest, total, slope, chosen])]))
    return merged


def _over_ranks(sums: Tensor, options: _Options) -> Tensor:
    """Merge the sums [4, N] of all ranks of the group."""
    if options.group is None or not sums.shape[1]:
        return sums
    parts = sums.new_empty(options.group.size(), *sums.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), sums, group=options.group)
    return _merge(parts)


def _merge(parts: Tensor) -> Tensor:
    """Merge [K, 4, N] of the K parts of a vocabulary into [4, N]."""
    each_largest, total, slope, chosen = parts.unbind(1)
    largest = each_largest.amax(0)
    shift = each_largest - largest
    scale = shift.exp()
    return torch.stack(
        [largest, (scale * total).sum(0), (scale * (slope + shift * total)).sum(0), chosen.amax(0)],
    )


def _blocks(hidden: Tensor, weight: Tensor, options: _Options) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of the head and their logits [N, v], divided by the temperature, in float32 or float64."""
    block_logits = _BLOCK_LOGITS if hidden.device.type == "cpu" else 4 * _BLOCK_LOGITS
    size = max(1, block_logits // max(1, len(hidden)))
    if options.float32 and (limit := largest_block(weight.shape[1], hidden.is_cuda)) is not None:
        size = min(size, limit)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    for start in range(0, options.num_rows, size):
        rows = slice(start, min(start + size, options.num_rows))
        logits = product(hidden, weight[rows].t(), options.float32).to(dtype)
        yield rows, logits if options.temperature == 1 else logits.div_(options.temperature)


def _columns(tokens: Tensor, rows: slice, options: _Options) -> tuple[Tensor, Tensor]:
    """Return [N, 1]: whether a token is in the block, and its column there (arbitrary if it is not)."""
    column = tokens[:, None] - (options.first_row + rows.start)
    width = rows.stop - rows.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _uses_triton(hidden: Tensor, fused_head: FusedHead) -> bool:
    """Return whether the Triton kernel computes the scores of these hidden states.

    Its products in float32 do not use tensor cores, so `auto` leaves them to torch.
    """
    if fused_head == "auto":
        return hidden.is_cuda and hidden.dtype in SIXTEEN_BITS and has_triton()
    return fused_head == "triton"


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
    fp32_lm_head: bool | None = None,
    fused_head: FusedHead = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs of `tokens` under `softmax(hidden @ weight.T / temperature)` and entropies; differentiable.

    Everything after the logits is computed in float32 (float64 for float64 inputs). Logits of 16-bit inputs are
    computed in float32, too, unless `fp32_lm_head` is False, which rounds them to the inputs' dtype. Gradients of
    logits are rounded to the inputs' dtype, and the products with them are summed in float32.

    With a `group`, every rank passes the same `hidden` and `tokens` and gets the same complete result, and all ranks
    must compute the same loss from it. The gradient of `weight` is complete. The gradient of `hidden` is the share of
    this rank's rows; the caller must sum it over the group. Megatron's copy to the tensor-parallel region, or its
    sequence-parallel gather from it, does so in the backward pass.

    Args:
        hidden: [N, H]; N may be 0 if it is 0 on all ranks.
        weight: [V_local, H] in the dtype of `hidden`.
        tokens: [N] int64; a token outside the vocabulary has log-prob -inf.
        temperature: above 0.
        entropy: compute the entropies.
        vocab_size: rows of the whole head from this one on are padding and have no probability.
        group: process group over which the rows of the head are split; None if `weight` is the whole head.
        first_row: index of the first row of `weight` in the whole, padded head.
        fp32_lm_head: keep logits in float32; None is on. Only 16-bit inputs differ.
        fused_head: the kernel; `auto` selects Triton for 16-bit inputs on CUDA if it is installed.

    Returns:
        Two [N] float32 tensors; the second is None unless `entropy`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: log-probabilities need a temperature above 0, not {temperature}")
    num_rows = min(max(vocab_size - first_row, 0), len(weight))
    float32, triton = uses_float32(hidden.dtype, fp32_lm_head), _uses_triton(hidden, fused_head)
    options = _Options(temperature, entropy, first_row, num_rows, group, float32, triton)
    return _Scores.apply(hidden, weight, tokens, options)
