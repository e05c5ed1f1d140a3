"""Tiny random checkpoints of every supported family in Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

logging.disable_progress_bar()

VOCAB = 61  # odd on purpose
EOS = 1
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_SHAPE, tie_word_embeddings=True)),
    "qwen3_tied": (Qwen3ForCausalLM, Qwen3Config(**_SHAPE, head_dim=32, tie_word_embeddings=True)),
    "qwen3_untied": (
        Qwen3ForCausalLM,
        Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=False, rms_norm_eps=1e-5),
    ),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**_SHAPE, **_MOE, head_dim=16, norm_topk_prob=True)),
    "qwen3_moe_unnormalised": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**_SHAPE, **_MOE, head_dim=16, norm_topk_prob=False),
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**_SHAPE, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    ),
}

# Families that differ from those above in structure or in the names of their weights. Windows are shorter than samples.
WINDOW = 6
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}
WIDER: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "mistral": (MistralForCausalLM, MistralConfig(**_SHAPE, sliding_window=None)),
    "mistral_window": (MistralForCausalLM, MistralConfig(**_SHAPE, sliding_window=WINDOW)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **_SHAPE,
            head_dim=32,
            query_pre_attn_scalar=20,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": _LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        ),
    ),
    "glm4": (Glm4ForCausalLM, Glm4Config(**_SHAPE, head_dim=16)),
    "glm": (GlmForCausalLM, GlmConfig(**_SHAPE, head_dim=16)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**{**_SHAPE, "intermediate_size": 32}, num_local_experts=4)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**_SHAPE, sliding_window=WINDOW)),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**_SHAPE)),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig(**_SHAPE, rope_parameters={**_LLAMA3, "original_max_position_embeddings": 64}),
    ),
    "qwen3_window": (
        Qwen3ForCausalLM,
        Qwen3Config(**_SHAPE, head_dim=16, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
}


# enough layers for virtual pipeline stages and enough key heads for four tensor-parallel ranks
DEEPER: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "four_layers": (
        Qwen3ForCausalLM,
        Qwen3Config(**{**_SHAPE, "num_hidden_layers": 4}, head_dim=16, tie_word_embeddings=True),
    ),
    "four_groups": (
        Qwen2ForCausalLM,
        Qwen2Config(**{**_SHAPE, "num_attention_heads": 8, "num_key_value_heads": 4}, tie_word_embeddings=False),
    ),
    "four_layers_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**{**_SHAPE, **_MOE, "num_hidden_layers": 4}, head_dim=16, norm_topk_prob=True),
    ),
}


def build_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Build a model with random weights, norms and biases large enough to affect the output."""
    model_class, config = (FAMILIES | WIDER | DEEPER)[family]
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("norm.weight")
            around = 0.0 if config.model_type == "gemma3_text" else 1.0  # its norms add one
            parameter.copy_(around + 0.3 * noise if is_norm else 0.15 * noise)
    return model.eval()


def write_model(folder: Path, family: str, seed: int = 0) -> Path:
    """Write config.json, safetensors and a tokenizer; return `folder`."""
    build_model(family, seed).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<eos>": EOS, "<unk>": 2} | {chr(62 + i): i for i in range(3, VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder)
    return folder
