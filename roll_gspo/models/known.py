"""Shapes of well-known checkpoints, so that a plan needs no download. They are those of the published `config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# layers, hidden, heads, key/value heads, columns of the feed-forward layer, vocabulary, tied embeddings
_QWEN25 = {
    "0.5B": (24, 896, 14, 2, 4864, 151936, True),
    "1.5B": (28, 1536, 12, 2, 8960, 151936, True),
    "3B": (36, 2048, 16, 2, 11008, 151936, True),
    "7B": (28, 3584, 28, 4, 18944, 152064, False),
    "14B": (48, 5120, 40, 8, 13824, 152064, False),
    "32B": (64, 5120, 40, 8, 27648, 152064, False),
    "72B": (80, 8192, 64, 8, 29568, 152064, False),
}
_QWEN3 = {
    "0.6B": (28, 1024, 16, 8, 3072, 151936, True),
    "1.7B": (28, 2048, 16, 8, 6144, 151936, True),
    "4B": (36, 2560, 32, 8, 9728, 151936, True),
    "8B": (36, 4096, 32, 8, 12288, 151936, False),
    "14B": (40, 5120, 40, 8, 17408, 151936, False),
    "32B": (64, 5120, 64, 8, 25600, 151936, False),
    "30B-A3B": (48, 2048, 32, 4, 6144, 151936, False),
    "235B-A22B": (94, 4096, 64, 4, 12288, 151936, False),
}
# experts, experts per token, columns of an expert
_EXPERTS = {"30B-A3B": (128, 8, 768), "235B-A22B": (128, 8, 1536)}
_KEYS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "tie_word_embeddings"),
)
_EXPERT_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_NAME = re.compile(r"Qwen/Qwen(2\.5|3)-(\d+(?:\.\d+)?B(?:-A\d+B)?)(?:-Base|-Instruct|-Instruct-2507|-Thinking-2507)?")


def known_config(name: str) -> Mapping[str, Any] | None:
    """Return the keys of `config.json` that decide a model's size, or None if the name is not known."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    family, size = match.groups()
    shape = (_QWEN25 if family == "2.5" else _QWEN3).get(size)
    if shape is None:
        return None
    config: dict[str, Any] = dict(zip(_KEYS, shape, strict=True))
    if family == "2.5":
        return config | {"model_type": "qwen2"}
    config |= {"model_type": "qwen3", "head_dim": 128}
    if size in _EXPERTS:
        config |= {"model_type": "qwen3_moe"} | dict(zip(_EXPERT_KEYS, _EXPERTS[size], strict=True))
    return config
