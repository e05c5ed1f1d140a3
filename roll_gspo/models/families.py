"""The decoder families that the megatron strategies know: one table entry per `model_type` (no torch).

An entry says how a family differs from Llama in computation and in the names and packing of its weights. Sizes and
switches of a single model are in `Architecture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class NormNames(NamedTuple):
    """Checkpoint names of the norms of a layer; None if the family has no norm there."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    @property
    def num_before(self) -> int:
        """Return the number of norms in front of attention and feed-forward layer."""
        return sum(name is not None for name in (self.before_attention, self.before_mlp))

    @property
    def num_after(self) -> int:
        """Return the number of norms behind attention and feed-forward layer."""
        return sum(name is not None for name in (self.after_attention, self.after_mlp))


class ExpertNames(NamedTuple):
    """Checkpoint names of a mixture of experts: the module, and the projections of an expert."""

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


_NORMS_IN_FRONT = NormNames()


@dataclass(frozen=True)
class Family:
    """Properties of the decoders of one `model_type`; the defaults are those of Llama.

    Attributes:
        qkv_bias: whether query, key and value projections have biases; None reads `attention_bias`.
        qk_norm: norm of queries and keys: per head, or over all heads of the projection.
        norms: names of the norms of a layer.
        zero_centered_norms: norms multiply by one plus their weight.
        scaled_embeddings: embeddings are multiplied by the square root of the hidden size.
        activation: activation of the gate.
        activation_key: key of `config.json` that names the activation.
        interleaved_rotary: rotary pairs are neighbours; else they are half a head apart.
        fused_qkv, fused_gate_up: the checkpoint stores the projections as one tensor.
        experts: names of the experts; None for dense families.
        expert_size_key: key of `config.json` with the columns of an expert.
        window_keys: how a model declares layers with a sliding window, see `Windows`.
        defaults: values of keys that `config.json` may omit.
    """

    qkv_bias: bool | None = False
    qk_norm: Literal["head", "projection"] | None = None
    norms: NormNames = _NORMS_IN_FRONT
    zero_centered_norms: bool = False
    scaled_embeddings: bool = False
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    activation_key: str = "hidden_act"
    interleaved_rotary: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    experts: ExpertNames | None = None
    expert_size_key: str = "moe_intermediate_size"
    window_keys: Windows = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)


# How layers with a sliding window are declared, besides `layer_types`:
#   none      there are none
#   all       `sliding_window` holds for every layer
#   switched  `sliding_window` holds for every layer if `use_sliding_window` is true
#   late      as `switched`, from layer `max_window_layers` on
#   pattern   `sliding_window` holds for every layer but each `sliding_window_pattern`-th
Windows = Literal["none", "all", "switched", "late", "pattern"]

_NORMS_AROUND = NormNames(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_NORMS_BEHIND = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_GLM4_NORMS = NormNames(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
_GLM_DEFAULTS = {
    "attention_bias": True,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
}
# Checkpoints with images omit most keys of their `text_config`.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True, window_keys="late"),
    "qwen3": Family(qk_norm="head", window_keys="late"),
    "qwen3_moe": Family(qk_norm="head", experts=ExpertNames(), window_keys="switched"),
    "mistral": Family(window_keys="all", defaults={"sliding_window": 4096}),
    "mixtral": Family(
        experts=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
        expert_size_key="intermediate_size",
        window_keys="all",
        defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": True, "rope_theta": 1e6},
    ),
    "gemma3_text": Family(
        qk_norm="head",
        norms=_NORMS_AROUND,
        zero_centered_norms=True,
        scaled_embeddings=True,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        window_keys="pattern",
        defaults=_GEMMA3_DEFAULTS,
    ),
    "glm": Family(qkv_bias=None, interleaved_rotary=True, fused_gate_up=True, defaults=_GLM_DEFAULTS),
    "glm4": Family(
        qkv_bias=None, norms=_GLM4_NORMS, interleaved_rotary=True, fused_gate_up=True, defaults=_GLM_DEFAULTS
    ),
    "phi3": Family(fused_qkv=True, fused_gate_up=True, window_keys="all", defaults={"rms_norm_eps": 1e-5}),
    "olmo2": Family(qk_norm="projection", norms=_NORMS_BEHIND, defaults={"rms_norm_eps": 1e-5}),
}
