"""Matrix products of the output head, in float32 if the factors have 16 bits.

A 16-bit logit of 20 has steps of 0.125 in bfloat16, which is the noise of a log-prob. Factors with 16 bits give exact
products in float32, so only the sum has to be kept in float32.

Legend: N tokens, H hidden size, V vocabulary, v rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# Elements of a block of the head that is converted to float32 outside of CUDA.
_BLOCK_ELEMENTS = 2**22


def uses_float32(dtype: torch.dtype, fp32_lm_head: bool | None) -> bool:
    """Return whether a head whose factors have this dtype gives float32 logits.

    Args:
        dtype: dtype of hidden states and weight.
        fp32_lm_head: the key of the engine; None is on. Other dtypes than 16-bit ones are kept anyway.
    """
    return dtype in SIXTEEN_BITS and fp32_lm_head is not False


def product(left: Tensor, right: Tensor, float32: bool) -> Tensor:
    """Return `left @ right`, in float32 if `float32` and the factors have 16 bits.

    CUDA multiplies 16-bit factors and writes the float32 sums. Other devices convert both factors; the caller limits
    their size.
    """
    if not float32 or left.dtype not in SIXTEEN_BITS:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def largest_block(hidden_size: int, on_cuda: bool) -> int | None:
    """Return how many rows of the head one float32 product may have; None if it converts no factor."""
    return None if on_cuda else max(1, _BLOCK_ELEMENTS // max(1, hidden_size))


class _Float32Logits(torch.autograd.Function):
    """(hidden [N, H], weight [V, H]) -> float32 logits [N, V] of both, rounded to a 16-bit dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        ctx.save_for_backward(hidden, weight)
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _row_blocks(weight):
                logits[:, rows] = product(hidden, weight[rows].t(), True)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        of_hidden, of_weight, _ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if of_hidden else None
        d_weight = torch.empty_like(weight, dtype=ctx.dtypes[1]) if of_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _row_blocks(weight):
                part = d_logits[:, rows].to(weight.dtype)
                if d_hidden is not None:
                    d_hidden += product(part, weight[rows], True)
                if d_weight is not None:
                    d_weight[rows] = product(part.t(), hidden, True)
        return None if d_hidden is None else d_hidden.to(ctx.dtypes[0]), d_weight, None


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    size = largest_block(weight.shape[1], weight.is_cuda) or max(1, len(weight))
    for start in range(0, len(weight), size):
        yield slice(start, min(start + size, len(weight)))


def float32_logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 logits [..., V] of `hidden` [..., H] and `weight` [V, H]; differentiable.

    Both factors are rounded to `dtype` first, as autocast does and as an engine with 16-bit weights computes.
    Gradients of the logits are rounded to `dtype`, too; their products are summed in float32.

    Args:
        hidden: hidden states in any floating dtype.
        weight: the head in any floating dtype.
        dtype: torch.bfloat16 or torch.float16.
    """
    flat = _Float32Logits.apply(hidden.flatten(0, -2), weight, dtype)
    return flat.view(*hidden.shape[:-1], len(weight))
