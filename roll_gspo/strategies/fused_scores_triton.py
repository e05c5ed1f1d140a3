"""Triton kernels of `fused_scores`: sums over the vocabulary, and gradients of logits.

Both compute tiles of logits [BM tokens, BN rows of the head] in float32 registers and never write them. The first keeps
running sums per token (online softmax) over a part of the vocabulary. The second recomputes the logits and writes their
gradients in the inputs' dtype, for the matrix products that follow.

Tiles are fixed per dtype and device, not tuned by timing, and do not depend on the number of tokens. The results of a
token therefore do not depend on the tokens beside it. There are no atomic operations.

Neighbouring programs work on `_GROUP` tiles of tokens and the same rows of the head, so that both stay in the L2 cache.

Legend: N tokens, H hidden size, v rows of the head, K parts of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from roll_gspo.strategies.head_products import SIXTEEN_BITS

_GROUP = 16
_TILES_PER_PART = 8


class Tiles(NamedTuple):
    """Sizes of a tile (tokens, rows of the head, steps along the hidden size) and the threads that compute it."""

    tokens: int
    rows: int
    hidden: int
    warps: int
    stages: int


LARGE = Tiles(128, 256, 64, warps=8, stages=3)
"""16-bit inputs on data-centre GPUs since Hopper: two warp groups, 147 KiB of shared memory."""
SMALL = Tiles(64, 128, 32, warps=4, stages=3)
"""16-bit inputs on other GPUs."""
FLOAT32 = Tiles(64, 64, 32, warps=4, stages=2)
"""Products of float32 inputs, without tensor cores."""


def tiles_for(dtype: torch.dtype, device: torch.device) -> Tiles:
    """Return the tiles of inputs of this dtype.

    Raises:
        ValueError: the kernels do not support the dtype.
    """
    if dtype == torch.float32:
        return FLOAT32
    if dtype not in SIXTEEN_BITS:
        raise ValueError(f"fused_head: triton computes in bfloat16, float16 and float32, not in {dtype}; use torch")
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return LARGE if major in (9, 10) else SMALL


@triton.jit
def _place(program, token_tiles, columns, GROUP: tl.constexpr):
    """Return (tile of tokens, column) of a program: `GROUP` tiles of tokens go through all columns together."""
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(token_tiles - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % size, inside // size


@triton.jit
def _logits(hidden, weight, token, row, num_tokens, num_rows, hidden_size, temperature_inverse, ROUNDED, BK, EVEN):
    """Return float32 logits [BM, BN] of tokens and rows of the head, divided by the temperature.

    Tokens and rows beyond the last repeat it; the caller masks them.
    """
    BM: tl.constexpr = token.shape[0]
    BN: tl.constexpr = row.shape[0]
    step = tl.arange(0, BK)
    left = hidden + tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None] * hidden_size + step[None, :]
    right = weight + tl.minimum(row, num_rows - 1).to(tl.int64)[None, :] * hidden_size + step[:, None]
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, hidden_size, BK):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = step < hidden_size - start
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        left += BK
        right += BK
    if ROUNDED:
        sums = sums.to(hidden.dtype.element_ty).to(tl.float32)
    return sums * temperature_inverse


@triton.jit
def _own_row(tokens, token, num_tokens, num_rows):
    """Return the row of the head of each token as int32, -1 if it is not among these rows."""
    row = tl.load(tokens + token, mask=token < num_tokens, other=-1)
    return tl.where((row >= 0) & (row < num_rows), row, -1).to(tl.int32)


@triton.jit
def sums_kernel(
    hidden,
    weight,
    tokens,
    sums,
    num_tokens,
    num_rows,
    hidden_size,
    temperature_inverse,
    ENTROPY: tl.constexpr,
    ROUNDED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the sums [4, BM] of a tile of tokens over `PART` rows of the head into `sums` [K, 4, N]."""
    parts = tl.cdiv(num_rows, PART)
    tile, part = _place(tl.program_id(0), tl.cdiv(num_tokens, BM), parts, GROUP)
    token = tile * BM + tl.arange(0, BM)
    chosen_row = _own_row(tokens, token, num_tokens, num_rows)
    largest = tl.full((BM,), -3.4028234663852886e38, dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    slope = tl.zeros((BM,), dtype=tl.float32)
    chosen = tl.full((BM,), float("-inf"), dtype=tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, num_rows), BN):
        row = start + tl.arange(0, BN)
        logits = _logits(
            hidden, weight, token, row, num_tokens, num_rows, hidden_size, temperature_inverse, ROUNDED, BK, EVEN
        )
        logits = tl.where((row < num_rows)[None, :], logits, float("-inf"))
        chosen = tl.maximum(chosen, tl.max(tl.where(row[None, :] == chosen_row[:, None], logits, float("-inf")), 1))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        shift = largest - new_largest
        scale = tl.exp(shift)
        logits -= new_largest[:, None]
        p = tl.exp(logits)
        if ENTROPY:
            # a row beyond the last has p 0 and the logit -inf, whose product is not a number
            terms = tl.where(logits == float("-inf"), 0.0, p * logits)
            slope = scale * (slope + shift * total) + tl.sum(terms, 1)
        total = scale * total + tl.sum(p, 1)
        largest = new_largest
    found = sums + part.to(tl.int64) * 4 * num_tokens + token
    inside = token < num_tokens
    tl.store(found, largest, mask=inside)
    tl.store(found + num_tokens, total, mask=inside)
    tl.store(found + 2 * num_tokens, slope, mask=inside)
    tl.store(found + 3 * num_tokens, chosen, mask=inside)


@triton.jit
def gradients_kernel(
    hidden,
    weight,
    tokens,
    log_total,
    of_log_prob,
    entropies,
    of_entropy,
    gradients,
    num_tokens,
    num_rows,
    hidden_size,
    temperature_inverse,
    ENTROPY: tl.constexpr,
    ROUNDED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the gradients of a tile of logits, -p (g + g_H (log p + H)) and g more for chosen tokens."""
    tile, column = _place(tl.program_id(0), tl.cdiv(num_tokens, BM), tl.cdiv(num_rows, BN), GROUP)
    token, row = tile * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    inside = token < num_tokens
    log_p = _logits(
        hidden, weight, token, row, num_tokens, num_rows, hidden_size, temperature_inverse, ROUNDED, BK, EVEN
    )
    log_p -= tl.load(log_total + token, mask=inside, other=0.0)[:, None]
    g = tl.load(of_log_prob + token, mask=inside, other=0.0)
    if ENTROPY:
        entropy = tl.load(entropies + token, mask=inside, other=0.0)
        slope = tl.load(of_entropy + token, mask=inside, other=0.0)
        d_logits = -tl.exp(log_p) * (g[:, None] + slope[:, None] * (log_p + entropy[:, None]))
    else:
        d_logits = -tl.exp(log_p) * g[:, None]
    chosen_row = _own_row(tokens, token, num_tokens, num_rows)
    d_logits = tl.where(row[None, :] == chosen_row[:, None], d_logits + g[:, None], d_logits)
    place = gradients + token.to(tl.int64)[:, None] * num_rows + row[None, :]
    tl.store(place, d_logits.to(gradients.dtype.element_ty), mask=inside[:, None] & (row < num_rows)[None, :])


def _settings(hidden: Tensor, temperature: float, rounded: bool, tiles: Tiles, **others: Any) -> dict[str, Any]:
    return others | {
        "hidden_size": hidden.shape[1],
        "temperature_inverse": 1 / temperature,
        "ROUNDED": rounded and hidden.dtype in SIXTEEN_BITS,
        "EVEN": hidden.shape[1] % tiles.hidden == 0,
        "BM": tiles.tokens,
        "BN": tiles.rows,
        "BK": tiles.hidden,
        "GROUP": _GROUP,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def sums_of_blocks(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, temperature: float, entropy: bool, rounded: bool
) -> Tensor:
    """Return [K, 4, N] over K parts of the rows: maximum, sums of e^(z - m) and e^(z - m) (z - m), chosen logit.

    Args:
        hidden: [N, H], contiguous.
        weight: [v, H], contiguous, in the same dtype.
        tokens: [N] int64 rows of `weight`; others are of no row.
        temperature: logits are divided by it.
        entropy: compute the third sum; else it is 0.
        rounded: round logits to the dtype of the inputs.
    """
    (num_tokens, _), num_rows = hidden.shape, len(weight)
    tiles = tiles_for(hidden.dtype, hidden.device)
    part = tiles.rows * _TILES_PER_PART
    num_parts = triton.cdiv(num_rows, part)
    sums = torch.empty(num_parts, 4, num_tokens, dtype=torch.float32, device=hidden.device)
    if sums.numel():
        sums_kernel[(triton.cdiv(num_tokens, tiles.tokens) * num_parts,)](
            hidden,
            weight,
            tokens,
            sums,
            num_tokens,
            num_rows,
            **_settings(hidden, temperature, rounded, tiles, ENTROPY=entropy, PART=part),
        )
    return sums


def gradients_of_logits(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_total: Tensor,
    of_log_prob: Tensor,
    entropies: Tensor | None,
    of_entropy: Tensor | None,
    *,
    temperature: float,
    rounded: bool,
) -> Tensor:
    """Return [N, v] in the dtype of the inputs: gradients of the logits before the division by the temperature.

    Args:
        hidden: [N, H], contiguous.
        weight: [v, H], contiguous, in the same dtype.
        tokens: [N] int64 rows of `weight`; others are of no row.
        log_total: [N] logarithm of the sum of e^z over the whole vocabulary.
        of_log_prob: [N] gradients of the log-probs, divided by the temperature.
        entropies: [N], or None without gradients of the entropies.
        of_entropy: [N] gradients of the entropies, divided by the temperature, or None.
        temperature: logits are divided by it.
        rounded: round logits to the dtype of the inputs.
    """
    (num_tokens, _), num_rows = hidden.shape, len(weight)
    tiles = tiles_for(hidden.dtype, hidden.device)
    gradients = torch.empty(num_tokens, num_rows, dtype=hidden.dtype, device=hidden.device)
    with_entropy = entropies is not None and of_entropy is not None
    if entropies is None or of_entropy is None:
        entropies = of_entropy = log_total  # not read
    if gradients.numel():
        gradients_kernel[(triton.cdiv(num_tokens, tiles.tokens) * triton.cdiv(num_rows, tiles.rows),)](
            hidden,
            weight,
            tokens,
            log_total,
            of_log_prob.contiguous(),
            entropies,
            of_entropy.contiguous(),
            gradients,
            num_tokens,
            num_rows,
            **_settings(hidden, temperature, rounded, tiles, ENTROPY=with_entropy),
        )
    return gradients
