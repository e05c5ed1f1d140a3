from __future__ import annotations

from typing import Any

import pytest
from tiny_models import FAMILIES

from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture

DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def test_defaults_are_those_of_transformers() -> None:
    model = Architecture.from_config(DENSE)
    assert (model.num_key_value_heads, model.head_dim, model.rope_theta) == (4, 16, 10000.0)
    assert not model.tie_word_embeddings and model.experts is None and model.qk_norm and not model.qkv_bias


def test_rotary_base_is_read_from_both_places() -> None:
    new = DENSE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    old = DENSE | {"rope_theta": 1e6, "rope_scaling": None}
    assert Architecture.from_config(new).rope_theta == Architecture.from_config(old).rope_theta == 1e6


def test_number_of_experts_is_read_under_both_names() -> None:
    renamed = {("num_local_experts" if k == "num_experts" else k): v for k, v in MOE.items()}
    for config in (MOE, renamed):
        experts = Architecture.from_config(config).experts
        assert experts is not None and (experts.num_experts, experts.normalize_top_k) == (8, False)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_that_transformers_writes_are_accepted(family: str) -> None:
    config = FAMILIES[family][1]
    model = Architecture.from_config(config.to_dict())
    assert model.num_layers == config.num_hidden_layers and model.rms_norm_eps == config.rms_norm_eps
    assert model.rope_theta == config.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rope_parameters"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ({"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
    ],
)
def test_unsupported_setting_is_named_by_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^here: {key}: "):
        Architecture.from_config(MOE | {"model_type": "qwen3"} | changes, "here")


def test_sliding_window_that_no_layer_uses_is_accepted() -> None:
    unused = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4}
    assert Architecture.from_config(DENSE | unused).num_layers == 4
    assert Architecture.from_config(DENSE | {"use_sliding_window": False, "sliding_window": 128}).num_layers == 4


def test_missing_key_is_named() -> None:
    config = {k: v for k, v in DENSE.items() if k != "hidden_size"}
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        Architecture.from_config(config)
