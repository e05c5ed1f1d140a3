"""Causal attention over samples of different lengths, without reading lengths from the device.

On GPUs in 16 bits, torch's varlen kernel (flash attention) takes all samples in one call. Otherwise samples of similar
length are padded to the longest and share a call of `scaled_dot_product_attention`. Indices depend only on the lengths,
which the host knows; all layers of a pass share them.

Legend: P tokens of this rank, N query heads, K key/value heads, D head size. With a window of W, a query sees its own
and the W - 1 positions before it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Consecutive queries, and the keys that each span of them sees. The last query of a span sees all its keys.

    Attributes:
        queries, keys: length of each span.
        query_starts, key_starts: [spans + 1] int32 on the device.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_starts: Tensor
    key_starts: Tensor


# (query [P, N, D], key and value [*, K, D], spans, scale, window or None) -> [P, N, D]
Kernel = Callable[[Tensor, Tensor, Tensor, Spans, float | None, int | None], Tensor]


def varlen_kernel(dtype: torch.dtype, windowed: bool = False) -> Kernel | None:
    """Return torch's varlen attention, or None if device, dtype or the installed torch do not support it.

    Args:
        dtype: dtype of queries, keys and values.
        windowed: some layer has a window.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability() < (8, 0):  # flash attention needs Ampere or later
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    if windowed and "window_size" not in inspect.signature(varlen_attn).parameters:  # torch before 2.11
        return None
    return adapted(varlen_attn)


def adapted(varlen_attn: Callable[..., Any]) -> Kernel:
    """Adapt `varlen_attn` of any torch to `Kernel`; its keywords differ between versions 2.10 and 2.13."""
    known = inspect.signature(varlen_attn).parameters

    def attend(
        query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float | None, window: int | None
    ) -> Tensor:
        more: dict[str, Any] = {"is_causal": True}
        if "window_size" in known:
            more = {"window_size": (-1 if window is None else window - 1, 0)}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in known:
                more["enable_gqa"] = True
            else:
                key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
        if scale is not None and "scale" in known:
            more["scale"] = scale
        elif scale is not None:
            query = query * (scale * math.sqrt(query.shape[2]))
        longest = max(spans.queries), max(spans.keys)
        return varlen_attn(query, key, value, spans.query_starts, spans.key_starts, *longest, **more)

    return attend


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    seen: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Map query [B, S, N, D], key and value [B, *, K, D] to [B, S, N, D]; causal, or with the mask `seen` [S, *]."""
    if seen is None and window is not None:
        seen = _band(query.shape[1], window, query.device)
    grouped = query.shape[2] != key.shape[2]
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float | None,
    kernel: Kernel | None,
    window: int | None = None,
) -> Tensor:
    """Map query [P, N, D], key and value [P, K, D] of packed samples to [P, N, D]."""
    if kernel is not None:
        return kernel(query, key, value, _spans(lengths, query.device), scale, window)
    groups, order = _groups(lengths, query.device)
    outs = []
    for index in groups:
        q, k, v = (tensor.index_select(0, index.flatten()).unflatten(0, index.shape) for tensor in (query, key, value))
        outs.append(padded_attention(q, k, v, scale, window=window).flatten(0, 1))
    return torch.cat(outs).index_select(0, order)


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    place: tuple[int, int],
    scale: float | None,
    kernel: Kernel | None,
    window: int | None = None,
) -> Tensor:
    """Map queries [P, N, D] of this context rank, keys and values [ranks * P, K, D] of all, to [P, N, D].

    A rank has an early and a late slice of every sample (see `own_positions`). Each slice sees a prefix of the sample,
    so no kernel needs a mask of all positions.

    Args:
        query, key, value: see above.
        lengths: tokens of each sample on this rank.
        place: (rank, number of ranks).
        scale: factor of the scores; None for 1 / sqrt(D).
        kernel: varlen kernel, if there is one.
        window: positions that a query sees, its own included; None sees all before it.
    """
    spans, index = _slices(lengths, *place, query.device)
    key, value = key.index_select(0, index), value.index_select(0, index)
    if kernel is not None:
        return kernel(query, key, value, spans, scale, window)
    outs = []
    pieces = zip(query.split(spans.queries), key.split(spans.keys), value.split(spans.keys), strict=True)
    for q, k, v in pieces:
        seen, before = None, len(k) - len(q)
        if before or (window is not None and window < len(k)):
            seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(before)
            seen = seen if window is None else seen.triu(before - window + 1)
        outs.append(padded_attention(q[None], k[None], v[None], scale, seen)[0])
    return torch.cat(outs)


@lru_cache(maxsize=32)
def _band(size: int, window: int, device: torch.device) -> Tensor | None:
    """Return the mask [S, S] of a causal window, or None if the window covers every sample."""
    if window >= size:
        return None
    return torch.ones(size, size, dtype=torch.bool, device=device).tril().triu(1 - window)


# Several micro-batches are in flight in a pipeline, and each comes back for its backward pass.
@lru_cache(maxsize=32)
def _spans(lengths: tuple[int, ...], device: torch.device) -> Spans:
    starts = _starts(lengths, device)
    return Spans(lengths, lengths, starts, starts)


@lru_cache(maxsize=32)
def _groups(lengths: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Group samples whose lengths round up to the same power of two.

    Returns:
        For each group the token [b, s] that each padded place holds (the last one of the sample in padding), and the
        index [P] of each token among the places of all groups.
    """
    of_size: dict[int, list[int]] = {}
    for sample, length in enumerate(lengths):
        of_size.setdefault((length - 1).bit_length(), []).append(sample)
    starts, order = [0, *accumulate(lengths)], torch.empty(sum(lengths), dtype=torch.int64)
    groups, places = [], 0
    for samples in of_size.values():
        longest = max(lengths[sample] for sample in samples)
        rows = []
        for sample in samples:
            start, length = starts[sample], lengths[sample]
            rows.append(torch.arange(start, start + longest).clamp(max=start + length - 1))
            order[start : start + length] = torch.arange(places, places + length)
            places += longest
        groups.append(torch.stack(rows).to(device, non_blocking=True))
    return groups, order.to(device, non_blocking=True)


@lru_cache(maxsize=32)
def _slices(lengths: tuple[int, ...], rank: int, ranks: int, device: torch.device) -> tuple[Spans, Tensor]:
    """Return the spans of this rank's slices, and the place of each key among the gathered keys [ranks * P]."""
    starts, tokens = [0, *accumulate(lengths)], sum(lengths)
    queries, keys, index = [], [], []
    for start, length in zip(starts, lengths, strict=False):
        half = length // 2
        firsts = [other * tokens + start for other in range(ranks)]
        firsts += [first + half for first in reversed(firsts)]  # slices of the sample in order of their positions
        places = torch.tensor(firsts)[:, None] + torch.arange(half)
        for piece in (rank, 2 * ranks - 1 - rank):
            queries.append(half)
            keys.append((piece + 1) * half)
            index.append(places[: piece + 1].flatten())
    spans = Spans(tuple(queries), tuple(keys), _starts(queries, device), _starts(keys, device))
    return spans, torch.cat(index).to(device, non_blocking=True)


def _starts(lengths: tuple[int, ...] | list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
