"""Tiny configurations of the model families that the model matrix covers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Windows of 8 tokens are shorter than the sequences of the matrix; vLLM has no smaller heads on CPUs.
_SHAPE = {
    "vocab_size": 264,  # of the builtin byte tokenizer
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
_LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 512},
    **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64},
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        models: published models of the family.
        model_type: name of the architecture in config.json.
        settings: differences from the tiny shape that all families share.
        attention: implementation of attention in transformers.
    """

    models: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"

    @property
    def hf_config(self) -> dict[str, Any]:
        """The configuration of the tiny model."""
        return {"model_type": self.model_type, **_SHAPE, **self.settings}


def letters(prompt: str, response: str, ground_truth: str) -> float:
    """Reward: the share of letters in a response, which differs between samples of a random model."""
    return sum(character.isalpha() for character in response) / max(len(response), 1)


FAMILIES = {
    "llama": Family("Llama 2, 3.1, 3.2, 3.3", "llama"),
    "qwen2": Family("Qwen2, Qwen2.5", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": Family("Qwen3-MoE", "qwen3_moe", {"head_dim": 32, **_QWEN_EXPERTS}),
    "mistral": Family("Mistral", "mistral", {"sliding_window": 8}),
    "mixtral": Family("Mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": Family(
        "Gemma 2",
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
        attention="eager",  # only this implementation caps the scores
    ),
    "gemma3": Family(
        "Gemma 3 (text)", "gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
    ),
    "glm4": Family("GLM-4 (0414)", "glm4", {"head_dim": 32}),
    "glm4_moe": Family("GLM-4.5, GLM-4.6", "glm4_moe", {"head_dim": 32, **_ROUTED}),
    "phi3": Family("Phi-3, Phi-4", "phi3"),
    "olmo2": Family("OLMo 2", "olmo2"),
    "olmo3": Family("OLMo 3", "olmo3", {"sliding_window": 8}),
    "olmoe": Family("OLMoE", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite": Family("Granite 3", "granite"),
    "smollm3": Family("SmolLM3", "smollm3"),
    "gpt_oss": Family(
        "gpt-oss",
        "gpt_oss",
        {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        attention="eager",  # transformers has no other for attention sinks on CPUs
    ),
    "deepseek_v2": Family("DeepSeek-V2-Lite", "deepseek_v2", {**_ROUTED, **_LATENT}),
    "deepseek_v3": Family("DeepSeek-V3, Moonlight", "deepseek_v3", {**_ROUTED, **_LATENT}),
}
