"""Size and architecture of a model, from its config.json alone (no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.checkpoint_shapes import count_parameters
from roll_gspo.models.config_files import CONFIG, read_object, text_config
from roll_gspo.models.known import known_config
from roll_gspo.models.tiny import BUILTIN, TINY_MODELS

# Keys that do not affect sizes, and that builtin or well-known models omit.
_NOT_READ = {"rms_norm_eps": 1e-6, "max_position_embeddings": 1}


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts: all parameters, those in experts, and where the numbers come from."""

    num_parameters: int
    num_expert_parameters: int
    source: str


def architecture_of(pretrain: str) -> Architecture | None:
    """Return the architecture of a builtin model, a local checkpoint or a well-known name; else None.

    Raises:
        ConfigError: the megatron strategies do not support the architecture.
    """
    config = _hf_config(pretrain)
    if config is not None:
        return Architecture.from_config({**_NOT_READ, **config}, pretrain)
    if (known := known_config(pretrain)) is not None:
        return Architecture.from_config({**_NOT_READ, **known}, pretrain)
    return None


def supported_architecture_of(pretrain: str) -> Architecture | None:
    """Return `architecture_of`, or None if the megatron strategies do not support the architecture."""
    try:
        return architecture_of(pretrain)
    except ConfigError:
        return None


def context_length_of(pretrain: str) -> int | None:
    """Return the context length of a builtin model or local checkpoint; None if unknown."""
    return _size(pretrain, "max_position_embeddings")


def head_size_of(pretrain: str) -> int | None:
    """Return the size of an attention head of a builtin model or local checkpoint; None if unknown."""
    hidden, heads = (_size(pretrain, key) for key in ("hidden_size", "num_attention_heads"))
    return _size(pretrain, "head_dim") or (hidden // heads if hidden and heads else None)


def _size(pretrain: str, key: str) -> int | None:
    value = (_hf_config(pretrain) or {}).get(key)
    return value if type(value) is int and value > 0 else None


def model_type_of(pretrain: str) -> str | None:
    """Return the `model_type` of a builtin model, a local checkpoint or a well-known name; None if unknown.

    Raises:
        ConfigError: `config.json` is damaged.
    """
    config = _hf_config(pretrain) or known_config(pretrain)
    return None if config is None else config.get("model_type")


def built_type_of(pretrain: str) -> str | None:
    """Return the `model_type` of the class that transformers builds: not that of `text_config`. None if unknown.

    Raises:
        ConfigError: `config.json` is damaged.
    """
    config_file = Path(pretrain) / CONFIG
    if not pretrain.startswith(BUILTIN) and config_file.is_file():
        return read_object(config_file).get("model_type")
    return model_type_of(pretrain)


def config_value(pretrain: str, key: str) -> Any:
    """Return a value of the `config.json` of a builtin model or local checkpoint; None if it is absent or unknown.

    Raises:
        ConfigError: `config.json` is damaged.
    """
    return (_hf_config(pretrain) or {}).get(key)


def _hf_config(pretrain: str) -> Mapping[str, Any] | None:
    if pretrain.startswith(BUILTIN):
        spec = TINY_MODELS.get(pretrain.removeprefix(BUILTIN))
        return None if spec is None else spec.hf_config
    config_file = Path(pretrain) / CONFIG
    return text_config(read_object(config_file)) if config_file.is_file() else None


def size_of(pretrain: str) -> ModelSize | None:
    """Return the size of a builtin model, a local checkpoint or a well-known name, else as read from a name; or None.

    A name such as `Some-7B` or `Some-30B-A3B` states the parameters.
    """
    if (config := _hf_config(pretrain)) is not None:
        try:
            return _count(config, "builtin" if pretrain.startswith(BUILTIN) else CONFIG)
        except (KeyError, TypeError, ZeroDivisionError):  # a family with other keys, or a damaged file
            return None
    if pretrain.startswith(BUILTIN):
        return None
    if (known := known_config(pretrain)) is not None:
        return _count(known, "known by name")
    if match := re.search(r"(\d+(?:\.\d+)?)B(?:-A(\d+(?:\.\d+)?)B)?", pretrain):
        total = float(match[1]) * 1e9
        # Nearly all inactive parameters are in experts; about half of the active ones are shared.
        experts = total - float(match[2]) * 1e9 / 2 if match[2] else 0.0
        return ModelSize(int(total), int(experts), "from its name")
    return None


def adapter_parameters(pretrain: str, rank: int, targets: Sequence[str]) -> int | None:
    """Return the parameters of a low-rank adapter, or None if the size of the model is not known.

    Experts have no adapter, because transformers keeps those of a layer in one tensor. In a family with other layers,
    the adapter is assumed to have a hundredth of the model's parameters.

    Args:
        pretrain: Hugging Face name or folder, or a `builtin:` name.
        rank: rank of the adapter.
        targets: names of the layers, or `all-linear` alone.
    """
    config = _hf_config(pretrain) or known_config(pretrain)
    size = size_of(pretrain)
    try:
        shapes = {} if config is None else _linear_layers(config)
    except (KeyError, TypeError, ZeroDivisionError):
        shapes = {}
    if not shapes:
        return None if size is None else size.num_parameters // 100
    assert config is not None
    chosen = shapes if tuple(targets) == ("all-linear",) else {name: shapes[name] for name in targets if name in shapes}
    return rank * config["num_hidden_layers"] * sum(rows + columns for rows, columns in chosen.values())


def _linear_layers(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the linear layers of a decoder layer, by name; without experts."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    layers = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }
    if not (config.get("num_experts") or config.get("num_local_experts")):
        inner = config["intermediate_size"]
        layers |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return layers


def _count(config: Mapping[str, Any], source: str) -> ModelSize:
    try:
        model = Architecture.from_config({**_NOT_READ, **config})
    except ConfigError:  # an unknown family is counted as one with separate projections
        return _estimate(config, source)
    return ModelSize(*count_parameters(model), source)


def _estimate(config: Mapping[str, Any], source: str) -> ModelSize:
    hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_dim * (heads + groups)
    num_experts = config.get("num_experts") or config.get("num_local_experts") or 0
    if num_experts:
        experts = layers * num_experts * 3 * hidden * config["moe_intermediate_size"]
        dense = hidden * num_experts
    else:
        experts, dense = 0, 3 * hidden * config["intermediate_size"]
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    total = embeddings + layers * (attention + dense + 2 * hidden) + hidden + experts
    return ModelSize(total, experts, source)
