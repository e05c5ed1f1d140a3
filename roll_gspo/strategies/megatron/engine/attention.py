"""The layer of a GPTModel: TransformerEngine's layer if it is installed, else torch's attention and norm.

Legend: S positions of this rank, B samples, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from roll_gspo.strategies.megatron.engine.packed_layout import own_positions
from roll_gspo.strategies.megatron.engine.parallel import context_group


class RMSNorm(torch.nn.RMSNorm):
    """torch's norm with megatron's constructor, marked so that sequence parallelism sums its gradient."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(MegatronModule):
    """`scaled_dot_product_attention` over right-padded or packed samples.

    Context ranks may share the positions of a sample.

    No mask is needed for padding: attention is causal, and padding is on the right.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.group = context_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Map query [S, B, N, D], key and value [S, B, K, D] to [S, B, N * D]. Packed inputs have no B."""
        if attention_mask is not None or attention_bias is not None:
            raise NotImplementedError("CausalAttention: masks and biases are not supported")
        packed, ranks = packed_seq_params is not None, self.group.size()
        lengths = [query.shape[0]]
        if packed:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            lengths = (packed_seq_params.cu_seqlens_q.diff() // ranks).tolist()
        if ranks > 1:
            out = self._across_ranks(query, key, value, lengths)
        elif packed:
            out = self._packed(query[:, 0], key[:, 0], value[:, 0], lengths)
        else:
            out = self._attend(*(tensor.transpose(0, 1) for tensor in (query, key, value))).transpose(0, 1)
        return out.flatten(1) if packed else out.flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """Map [B, S, heads, D] each to [B, S, N, D]; causal, or with a mask [S, S of keys]."""
        grouped = query.shape[2] != key.shape[2]
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, seen, is_causal=seen is None, scale=self.softmax_scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Map [S, heads, D] each to [S, N, D].

        Samples of similar length are padded to the longest and share one call.
        """
        of_size: dict[int, list[int]] = {}
        for sample, length in enumerate(lengths):
            of_size.setdefault((length - 1).bit_length(), []).append(sample)
        size = torch.tensor(lengths, device=query.device)
        starts = size.cumsum(0) - size
        outs, places = [], []
        for samples in of_size.values():
            chosen = torch.tensor(samples, device=query.device)
            step = torch.arange(int(size[chosen].max()), device=query.device)
            valid = step < size[chosen, None]
            index = starts[chosen, None] + torch.minimum(step, size[chosen, None] - 1)
            outs.append(self._attend(query[index], key[index], value[index])[valid])
            places.append(index[valid])
        return torch.cat(outs)[torch.cat(places).argsort()]

    def _across_ranks(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Map [S, B, heads, D] each to [S, B, N, D]: local queries, keys of all context ranks, one sample at a time."""
        ranks, rank = self.group.size(), self.group.rank()
        key, value = (
            gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=self.group).unflatten(
                0, (ranks, -1)
            )
            for tensor in (key, value)
        )
        outs = []
        pieces = zip(query.split(lengths), key.split(lengths, 1), value.split(lengths, 1), strict=True)
        for q, k, v in pieces:
            length = len(q) * ranks
            there = torch.cat([own_positions(length, other, ranks) for other in range(ranks)])
            seen = own_positions(length, rank, ranks)[:, None] >= there
            q, k, v = (tensor.transpose(0, 1) for tensor in (q, k.flatten(0, 1), v.flatten(0, 1)))
            outs.append(self._attend(q, k, v, seen).transpose(0, 1))
        return torch.cat(outs)


def decoder_spec(config: TransformerConfig, virtual_stage: int | None = None) -> Any:
    """Return the spec of layers and final norm for `GPTModel`: a `ModuleSpec` or `TransformerBlockSubmodules`."""
    if HAVE_TE and torch.cuda.is_available():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    spec: Any = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = [spec] * get_num_layers_to_build(config, vp_stage=virtual_stage)
    norm: Any = RMSNorm  # megatron expects a class, although the annotation is an instance
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
