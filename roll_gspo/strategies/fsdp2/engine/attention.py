"""Attention of transformers models over packed samples.

transformers selects attention by name. The lengths of the samples reach this one as an argument of the model, which
every layer hands on. The cost is linear in the number of samples; a mask over all packed tokens would be quadratic.

Legend: P packed tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from roll_gspo.strategies.varlen import packed_attention, varlen_kernel

NAME = "roll_gspo_packed"
_LARGEST_HEAD = 256


def attend_to_samples(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    sample_lengths: tuple[int, ...],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Map query [1, N, P, D], key and value [1, K, P, D] to [1, P, N, D]; every sample sees only itself."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # flash attention needs heads of one size, at most 256
    fits = q.shape[-1] == v.shape[-1] <= _LARGEST_HEAD
    kernel = varlen_kernel(q.dtype, windowed=sliding_window is not None) if fits else None
    return packed_attention(q, k, v, sample_lengths, scaling, kernel, sliding_window)[None], None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make every layer of a model read packed samples."""
    AttentionInterface.register(NAME, attend_to_samples)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
