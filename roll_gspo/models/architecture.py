"""Decoder architectures, read from a Hugging Face `config.json` and validated.

The supported families are the entries of `families.FAMILIES`. An unsupported setting that would change the computation
is an error that names its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.models.config_files import read_object, text_config
from roll_gspo.models.families import FAMILIES, Family

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"),
    *("num_local_experts", "sliding_window"),
)
_NESTED = "language_model."  # of decoders whose config is the `text_config` of a model with images
_FULL, _SLIDING = "full_attention", "sliding_attention"
_FIX = "is not supported by the megatron strategies; use an hf strategy or another model"


@dataclass(frozen=True)
class Experts:
    """Mixture of experts of every layer: sizes, experts per token, and whether routing weights are normalised."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    normalize_top_k: bool


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies of Llama 3.1: long wavelengths are stretched by `factor`, short ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of the layers with full attention, and of those with a sliding window.

    Attributes:
        scaling: Llama 3 scaling, or the factor that divides all frequencies, or None.
        fraction: part of a head that is rotated.
        local_theta: base of layers with a sliding window; None if it is that of all layers.
    """

    scaling: Llama3Scaling | float | None = None
    fraction: float = 1.0
    local_theta: float | None = None


@dataclass(frozen=True)
class Architecture:
    """Shapes and constants of a decoder. Sizes are those of the whole, unsharded model.

    Attributes:
        windows: for each layer the number of tokens that a token sees, itself included; None sees all before it. Empty
            if no layer has a window.
        attention_bias: value of `attention_bias`, for families that decide by it.
        query_size: the scores of attention are divided by the square root of this number, the head size by default.
        prefix: start of the names of all weights, in a checkpoint that holds more than the decoder.
    """

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
    rotary: Rotary = Rotary()
    windows: tuple[int | None, ...] = ()
    attention_bias: bool = False
    query_size: float | None = None
    prefix: str = ""

    @property
    def family(self) -> Family:
        """Table entry of the family."""
        return FAMILIES[self.model_type]

    @property
    def qkv_bias(self) -> bool:
        """True if the query, key and value projections have biases."""
        return self.attention_bias if self.family.qkv_bias is None else self.family.qkv_bias

    @property
    def qk_norm(self) -> bool:
        """True if queries and keys are normalised."""
        return self.family.qk_norm is not None

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """Sizes of the norms of queries and keys; 0 if there are none."""
        heads = {None: (0, 0), "head": (1, 1), "projection": (self.num_attention_heads, self.num_key_value_heads)}
        query, key = heads[self.family.qk_norm]
        return query * self.head_dim, key * self.head_dim

    @property
    def window(self) -> int | None:
        """Number of tokens that layers with a sliding window see; None if there are none."""
        return next((size for size in self.windows if size is not None), None)

    @staticmethod
    def from_checkpoint(folder: Path) -> Architecture:
        """Read `config.json` of a checkpoint folder.

        Raises:
            ConfigError: the file does not exist, or the architecture is not supported.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"{folder}: no config.json; give a folder in Hugging Face layout")
        return Architecture.from_config(text_config(read_object(path)), str(path))

    @staticmethod
    def from_config(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
        """Convert a parsed `config.json`; errors start with `where`.

        Raises:
            ConfigError: a key is missing, or the architecture is not supported.
        """
        family = FAMILIES.get(str(config.get("model_type")))
        if family is None:
            raise ConfigError(f"{where}: {_unknown(config)}")
        config = {**family.defaults, **config}
        if problems := [*_unsupported(config, family), *_wrong_sizes(config)]:
            raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
        try:
            return _read(config, family)
        except KeyError as error:
            raise ConfigError(f"{where}: {error.args[0]} is missing; the model cannot be built") from error


def _unknown(config: Mapping[str, Any]) -> str:
    return (
        f"model_type: '{config.get('model_type')}' is not supported by the megatron strategies, which know "
        f"{', '.join(FAMILIES)}; set strategy=fsdp2 (any number of ranks) or strategy=hf (one rank), which take every "
        "decoder of transformers"
    )


def _read(config: Mapping[str, Any], family: Family) -> Architecture:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    experts = None
    if family.experts is not None:
        # transformers 5 writes num_local_experts, earlier versions num_experts
        num_experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
        experts = Experts(
            num_experts,
            config["num_experts_per_tok"],
            config[family.expert_size_key],
            bool(config.get("norm_topk_prob", False)),
        )
    rope = _rope(config)
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
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        rotary=Rotary(_scaling(rope), _rotated_fraction(config, rope), _local_theta(config)),
        windows=_windows(config, family),
        attention_bias=bool(config.get("attention_bias", False)),
        query_size=config.get("query_pre_attn_scalar"),
        prefix=_NESTED if isinstance(config.get("text_config"), dict) else "",
    )


def _wrong_sizes(config: Mapping[str, Any]) -> list[str]:
    """Return one line per size that is no positive integer; missing ones are reported when they are read."""
    return [
        f"{key}: {config[key]!r} is no positive integer; restore the file"
        for key in _SIZES
        if config.get(key) is not None and (type(config[key]) is not int or config[key] < 1)
    ]


def _rope(config: Mapping[str, Any], kind: str = _FULL) -> Mapping[str, Any]:
    """Return the rotary settings of a kind of layer.

    They are stored under `rope_parameters` by transformers 5, for each kind if the kinds differ, and under
    `rope_scaling` before.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if _FULL in settings or _SLIDING in settings:
        return settings.get(kind) or {}
    return settings if kind == _FULL else {}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _scaling(rope: Mapping[str, Any]) -> Llama3Scaling | float | None:
    kind = _rope_type(rope)
    if kind == "llama3":
        return Llama3Scaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            rope["original_max_position_embeddings"],
        )
    return float(rope["factor"]) if kind == "linear" else None


def _rotated_fraction(config: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    found = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return 1.0 if found is None else float(found)


def _local_theta(config: Mapping[str, Any]) -> float | None:
    theta = _rope(config, _SLIDING).get("rope_theta", config.get("rope_local_base_freq"))
    return None if theta is None else float(theta)


def _windows(config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, empty if there are none."""
    size, kinds = _window_size(config, family), _layer_kinds(config, family)
    if size is None or _SLIDING not in kinds:
        return ()
    return tuple(size if kind == _SLIDING else None for kind in kinds)


def _window_size(config: Mapping[str, Any], family: Family) -> int | None:
    switched_off = family.window_keys in ("switched", "late") and not config.get("use_sliding_window")
    return None if switched_off else config.get("sliding_window")


def _layer_kinds(config: Mapping[str, Any], family: Family) -> list[str]:
    layers = config["num_hidden_layers"]
    if config.get("layer_types"):
        return list(config["layer_types"])
    if family.window_keys in ("all", "switched"):
        return [_SLIDING] * layers
    if family.window_keys == "late":
        first = config.get("max_window_layers", 28)  # default of transformers
        return [_SLIDING if layer >= first else _FULL for layer in range(layers)]
    if family.window_keys == "pattern":
        period = config.get("_sliding_window_pattern") or config["sliding_window_pattern"]
        return [_SLIDING if (layer + 1) % period else _FULL for layer in range(layers)]
    return [_FULL] * layers


def _unsupported(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return one line per key whose value the megatron strategies would not compute correctly."""
    problems = [*_unsupported_rope(config)]
    if config.get("mlp_only_layers"):
        problems.append(f"mlp_only_layers: {config['mlp_only_layers']} {_FIX}")
    if config.get("decoder_sparse_step", 1) != 1:
        problems.append(f"decoder_sparse_step: {config['decoder_sparse_step']} {_FIX}")
    refused = ["mlp_bias", "quantization_config", "attn_logit_softcapping", "final_logit_softcapping"]
    refused += ["use_bidirectional_attention", *(["attention_bias"] if family.qkv_bias is not None else [])]
    problems += [f"{key}: {config[key]} {_FIX}" for key in refused if config.get(key)]
    if (activation := config.get(family.activation_key, family.activation)) != family.activation:
        problems.append(f"{family.activation_key}: '{activation}' {_FIX}")
    return [*problems, *_unsupported_layers(config, family)]


def _unsupported_layers(config: Mapping[str, Any], family: Family) -> list[str]:
    kinds = config.get("layer_types") or []
    known = {_FULL} if family.window_keys == "none" else {_FULL, _SLIDING}
    if unknown := sorted({*kinds} - known):
        return [f"layer_types: '{unknown[0]}' {_FIX}"]
    if kinds and len(kinds) != config.get("num_hidden_layers"):
        layers = config.get("num_hidden_layers")
        return [f"layer_types: lists {len(kinds)} layers, but num_hidden_layers is {layers}; restore the file"]
    if _SLIDING in kinds and _window_size(config, family) is None:
        return ["sliding_window: no size is set, but layer_types has layers with a sliding window; restore the file"]
    return []


def _unsupported_rope(config: Mapping[str, Any]) -> list[str]:
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope, local = _rope(config), _rope(config, _SLIDING)
    problems = []
    if (kind := _rope_type(rope)) not in ("default", "linear", "llama3"):
        problems.append(f"{key}: rope type '{kind}' {_FIX}")
    if (kind := _rope_type(local)) != "default":
        problems.append(f"{key}: rope type '{kind}' of layers with a sliding window {_FIX}")
    return problems
