"""Decoder architectures, read from a Hugging Face `config.json` and validated.

Supported families: Llama, Qwen2, Qwen3, Qwen3-MoE. An unsupported setting that would change the computation is an
error that names its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.models.config_files import read_object

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"),
)


@dataclass(frozen=True)
class Experts:
    """Mixture of experts of every layer: sizes, experts per token, and whether routing weights are normalised."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    normalize_top_k: bool


@dataclass(frozen=True)
class Architecture:
    """Shapes and constants of a decoder. Sizes are those of the whole, unsharded model."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    experts: Experts | None

    @property
    def qkv_bias(self) -> bool:
        """True if the query, key and value projections have biases."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """True if queries and keys are normalised per head."""
        return self.model_type.startswith("qwen3")

    @staticmethod
    def from_checkpoint(folder: Path) -> Architecture:
        """Read `config.json` of a checkpoint folder.

        Raises:
            ConfigError: the file does not exist, or the architecture is not supported.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"{folder}: no config.json; give a folder in Hugging Face layout")
        return Architecture.from_config(read_object(path), str(path))

    @staticmethod
    def from_config(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
        """Convert a parsed `config.json`; errors start with `where`.

        Raises:
            ConfigError: a key is missing, or the architecture is not supported.
        """
        if problems := [*_unsupported(config), *_wrong_sizes(config)]:
            raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
        try:
            return _read(config)
        except KeyError as error:
            raise ConfigError(f"{where}: {error.args[0]} is missing; the model cannot be built") from error


def _read(config: Mapping[str, Any]) -> Architecture:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    experts = None
    if config["model_type"] == "qwen3_moe":
        # transformers 5 writes num_local_experts, earlier versions num_experts
        num_experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
        experts = Experts(
            num_experts,
            config["num_experts_per_tok"],
            config["moe_intermediate_size"],
            bool(config.get("norm_topk_prob", False)),
        )
    return Architecture(
        model_type=config["model_type"],
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=float(_rope(config).get("rope_theta") or config.get("rope_theta", 10000.0)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
    )


def _wrong_sizes(config: Mapping[str, Any]) -> list[str]:
    """Return one line per size that is no positive integer; missing ones are reported when they are read."""
    return [
        f"{key}: {config[key]!r} is no positive integer; restore the file"
        for key in _SIZES
        if config.get(key) is not None and (type(config[key]) is not int or config[key] < 1)
    ]


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rotary settings, stored under `rope_parameters` by transformers 5 and `rope_scaling` before."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Return one line per key whose value the megatron strategies would not compute correctly."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        return [f"model_type: '{model_type}' is not supported; use one of {', '.join(FAMILIES)}, or an hf strategy"]
    fix = "is not supported by the megatron strategies; use an hf strategy or another model"
    problems = []
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        problems.append(f"{key}: rope type '{kind}' {fix}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"rope_parameters: partial_rotary_factor {rope['partial_rotary_factor']} {fix}")
    if config.get("mlp_only_layers"):
        problems.append(f"mlp_only_layers: {config['mlp_only_layers']} {fix}")
    if config.get("decoder_sparse_step", 1) != 1:
        problems.append(f"decoder_sparse_step: {config['decoder_sparse_step']} {fix}")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(key):
            problems.append(f"{key}: {config[key]} {fix}")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act: '{config['hidden_act']}' {fix}")
    if _has_sliding_window(config):
        problems.append(f"use_sliding_window: a sliding window {fix}")
    return problems


def _has_sliding_window(config: Mapping[str, Any]) -> bool:
    """Return whether any layer attends to a sliding window."""
    if config.get("layer_types"):
        return any(kind != "full_attention" for kind in config["layer_types"])
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return False
    if config["model_type"] == "qwen3_moe":
        return True
    return config.get("max_window_layers", 0) < config.get("num_hidden_layers", 0)
