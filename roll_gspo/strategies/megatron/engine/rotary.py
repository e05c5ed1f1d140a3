"""Rotary embeddings of a GPTModel, one table of angles for each kind of layer.

Legend: S positions of this rank, P packed tokens of this rank, D rotated part of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from roll_gspo.models.architecture import Architecture, Llama3Scaling
from roll_gspo.strategies.megatron.engine.packed_layout import PackedSamples


class LayerRotary(torch.nn.Module):
    """The rotary embeddings of a model, computed once per pass.

    megatron's own splits packed tokens in every layer by lengths that it reads from the device.

    Args:
        rotaries: of layers with full attention and, if they differ, of those with a sliding window.
        gathers: gather the angles of packed tokens; else attention does it (TransformerEngine).
    """

    def __init__(self, rotaries: Sequence[RotaryEmbedding], gathers: bool) -> None:
        super().__init__()
        self.rotaries = torch.nn.ModuleList(rotaries)
        self.gathers = gathers

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `forward` gets: the packed samples, else the number of positions."""
        packed = next((value for value in (*args, *kwargs.values()) if isinstance(value, PackedSamples)), None)
        if packed is not None and self.gathers:
            return packed
        first: Any = self.rotaries[0]
        return first.get_rotary_seq_len(*args, **kwargs)

    def forward(self, of: PackedSamples | int, **kwargs: Any) -> Tensor:
        """Return angles [P, 1, 1, D] of packed tokens, or [S, 1, 1, D] of padded ones.

        If the kinds of layers differ, their angles are stacked along a new first dimension.
        """
        if isinstance(of, PackedSamples):
            wholes = [rotary(of.max_seqlen_q, packed_seq=True) for rotary in self.rotaries]
            tables = [whole.index_select(0, of.positions) for whole in wholes]
        else:
            tables = [rotary(of, **kwargs) for rotary in self.rotaries]
        return tables[0] if len(tables) == 1 else torch.stack(tables)


class KindedAttention(SelfAttention):
    """Attention of a model whose layers have different rotary embeddings: it takes the angles of its kind."""

    def forward(self, *inputs: Any, rotary_pos_emb: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Attend with the angles of layers with full attention (0) or with a sliding window (1)."""
        config = self.config
        skipped: Any = config.window_attn_skip_freq
        kind = int(is_layer_window_attention(config.window_size, skipped, self.layer_number))
        return super().forward(*inputs, rotary_pos_emb=rotary_pos_emb[kind], **options)


def layer_rotary(model: Architecture, rotary: RotaryEmbedding, gathers: bool) -> LayerRotary:
    """Return the rotary embeddings of a model.

    Args:
        model: the architecture.
        rotary: megatron's embedding for layers with full attention; its frequencies are scaled in place.
        gathers: see `LayerRotary`.
    """
    scaling = model.rotary.scaling
    if isinstance(scaling, Llama3Scaling):
        constants: Any = vars(scaling)  # megatron's annotations are integers
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **constants)
    elif scaling is not None:
        rotary.inv_freq = rotary.inv_freq / scaling
    rotaries = [rotary]
    if has_local_rotary(model):
        local: Any = model.rotary.local_theta
        options = {"rotary_interleaved": rotary.rotary_interleaved, "cp_group": rotary.cp_group}
        rotaries.append(RotaryEmbedding(model.head_dim, model.rotary.fraction, rotary_base=local, **options))
    return LayerRotary(rotaries, gathers)


def has_local_rotary(model: Architecture) -> bool:
    """Return whether layers with a sliding window have another rotary embedding."""
    return model.rotary.local_theta is not None and model.window is not None
