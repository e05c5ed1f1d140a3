"""The layer of a GPTModel: TransformerEngine's layer if it is installed, else torch's attention and norm.

Legend: S positions of this rank, B samples, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.megatron.engine.norms import (
    KeyNorm,
    NormedRowParallelLinear,
    OutputNorm,
    QueryNorm,
    RMSNorm,
)
from roll_gspo.strategies.megatron.engine.packed_layout import PackedSamples
from roll_gspo.strategies.megatron.engine.parallel import context_group
from roll_gspo.strategies.megatron.engine.rotary import KindedAttention, has_local_rotary
from roll_gspo.strategies.varlen import (
    context_attention,
    packed_attention,
    padded_attention,
    varlen_kernel,
)


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
        windowed = is_layer_window_attention(config.window_size, _skipped(config), layer_number)
        # megatron's window counts the tokens to the left, ours also the token itself
        self.window = config.window_size[0] + 1 if windowed and config.window_size else None
        self.kernel = varlen_kernel(config.params_dtype, windowed)

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
            out = packed_attention(*tokens, samples.lengths, self.softmax_scale, self.kernel, self.window).unsqueeze(1)
        else:
            q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
            out = padded_attention(q, k, v, self.softmax_scale, window=self.window).transpose(0, 1)
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
        out = context_attention(q, k, v, lengths, place, self.softmax_scale, self.kernel, self.window)
        return out.unflatten(0, (batch, size)).transpose(0, 1)


def uses_transformer_engine() -> bool:
    """Return whether the layers of models are TransformerEngine's."""
    return HAVE_TE and torch.cuda.is_available()


def decoder_spec(model: Architecture, config: TransformerConfig, virtual_stage: int | None = None) -> Any:
    """Return the spec of layers and final norm for `GPTModel`: a `ModuleSpec` or `TransformerBlockSubmodules`."""
    if uses_transformer_engine():
        spec: Any = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        _adapt(spec, model)
        return spec
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    _adapt(spec, model)
    layers = [spec] * get_num_layers_to_build(config, vp_stage=virtual_stage)
    norm: Any = RMSNorm  # megatron expects a class, although the annotation is an instance
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _adapt(spec: Any, model: Architecture) -> None:
    """Place the norms and rotary embeddings of the family in the spec of a layer that has norms in front only."""
    layer, norms = spec.submodules, model.family.norms
    attention = layer.self_attention.submodules
    # since megatron-core 0.19 a partial constructor
    feed_forward = layer.mlp.keywords["submodules"] if isinstance(layer.mlp, partial) else layer.mlp.submodules
    if norms.before_attention is None:
        layer.input_layernorm, attention.linear_qkv = IdentityOp, _plain_linear()
    if norms.before_mlp is None:
        layer.pre_mlp_layernorm, feed_forward.linear_fc1 = IdentityOp, _plain_linear()
    if norms.after_attention is not None:
        attention.linear_proj = _normed_linear()
    if norms.after_mlp is not None:
        feed_forward.linear_fc2 = _normed_linear()
    if model.family.qk_norm == "projection":
        attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    if has_local_rotary(model):
        layer.self_attention.module = KindedAttention


def _plain_linear() -> type:
    """Return a column-parallel projection without a norm in front of it."""
    return TESpecProvider().column_parallel_linear() if uses_transformer_engine() else ColumnParallelLinear


def _normed_linear() -> type:
    """Return a row-parallel projection with a norm behind it."""
    if not uses_transformer_engine():
        return NormedRowParallelLinear
    projection: Any = TESpecProvider().row_parallel_linear()
    return type("NormedRowParallelLinear", (OutputNorm, projection), {})


def _skipped(config: TransformerConfig) -> Any:
    """Return the layers with a window; megatron's annotation does not allow None."""
    return config.window_attn_skip_freq
