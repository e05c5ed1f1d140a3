"""Tiny random checkpoints of every supported family in Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
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
    model_class, config = (FAMILIES | DEEPER)[family]
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("norm.weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.15 * noise)
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
