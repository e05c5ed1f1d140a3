"""Builtin models: real transformers architectures and a real tokenizer, small enough for a laptop.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILTIN = "builtin:"
PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT, SYSTEM, "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>")
NUM_BYTES = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": NUM_BYTES + len(SPECIAL_TOKENS),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class TinyModel:
    """A builtin model, defined by its transformers configuration."""

    hf_config: Mapping[str, Any]


TINY_MODELS = {
    "tiny_qwen3": TinyModel(_QWEN3),
    "tiny_qwen3_moe": TinyModel(
        _QWEN3
        | {
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        }
    ),
}


def byte_tokenizer() -> Any:
    """Build a tokenizer with one token per byte plus chat tokens; it can encode any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(spec: TinyModel, seed: int) -> Any:
    """Build a `transformers` model with random float32 weights; the global random state is restored."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(spec.hf_config)
    ids = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    config = AutoConfig.for_model(
        settings.pop("model_type"), **settings, eos_token_id=ids[END], pad_token_id=ids[PAD], bos_token_id=None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def fingerprint(*parts: Any) -> str:
    """Return ten hexadecimal digits that identify the inputs of a cached model."""
    text = json.dumps(parts, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face layout."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a progress bar would break the live view
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
