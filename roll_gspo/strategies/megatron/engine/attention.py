"""The layer of a GPTModel: TransformerEngine's layer if it is installed, else torch's attention and norm.

Legend: S positions of this rank, B samples, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
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

from roll_gspo.strategies.megatron.engine.packed_layout import PackedSamples
from roll_gspo.strategies.megatron.engine.parallel import context_group
from roll_gspo.strategies.varlen import (
    context_attention,
    packed_attention,
    padded_attention,
    varlen_kernel,
)


class RMSNorm(torch.nn.RMSNorm):
    """torch's norm with megatron's constructor, marked so that sequence parallelism sums its gradient."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(MegatronModule):
    """torch's attention over right-padded or packed samples.

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
        self.kernel = varlen_kernel(config.params_dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSamples | None = None,
    ) -> Tensor:
        """Map query [S, B, N, D], key and value [S, B, K, D] to [S, B, N * D]. B is 1 if samples are packed."""
        if attention_mask is not None or attention_bias is not None:
            raise NotImplementedError("CausalAttention: masks and biases are not supported")
        samples = packed_seq_params
        if self.group.size() > 1:
            out = self._across_ranks(query, key, value, samples)
        elif samples is not None:
            tokens = query[:, 0], key[:, 0], value[:, 0]
            out = packed_attention(*tokens, samples.lengths, self.softmax_scale, self.kernel).unsqueeze(1)
        else:
            q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
            out = padded_attention(q, k, v, self.softmax_scale).transpose(0, 1)
        return out.flatten(2)

    def _across_ranks(self, query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples | None) -> Tensor:
        """Map [S, B, heads, D] each to [S, B, N, D]: local queries, keys of all context ranks."""
        size, batch = query.shape[:2]
        lengths = (size,) * batch if samples is None else samples.lengths
        q, k, v = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
        k, v = (
            gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=self.group)
            for tensor in (k, v)
        )
        place = self.group.rank(), self.group.size()
        out = context_attention(q, k, v, lengths, place, self.softmax_scale, self.kernel)
        return out.unflatten(0, (batch, size)).transpose(0, 1)


class PackedRotary(torch.nn.Module):
    """The rotary embedding of a model, gathered once per pass at the positions of packed tokens.

    megatron's own splits the tokens of every layer by lengths that it reads from the device.
    """

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `forward` gets: the packed samples, else the number of positions."""
        packed = next((value for value in (*args, *kwargs.values()) if isinstance(value, PackedSamples)), None)
        return self.rotary.get_rotary_seq_len(*args, **kwargs) if packed is None else packed

    def forward(self, of: PackedSamples | int, **kwargs: Any) -> Tensor:
        """Return angles [P, 1, 1, D] of packed tokens, or [S, 1, 1, D] of padded ones."""
        if isinstance(of, PackedSamples):
            return self.rotary(of.max_seqlen_q, packed_seq=True).index_select(0, of.positions)
        return self.rotary(of, **kwargs)


def uses_transformer_engine() -> bool:
    """Return whether the layers of models are TransformerEngine's."""
    return HAVE_TE and torch.cuda.is_available()


def decoder_spec(config: TransformerConfig, virtual_stage: int | None = None) -> Any:
    """Return the spec of layers and final norm for `GPTModel`: a `ModuleSpec` or `TransformerBlockSubmodules`."""
    if uses_transformer_engine():
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
