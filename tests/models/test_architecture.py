from __future__ import annotations

from typing import Any

import pytest
from tiny_models import FAMILIES
from transformers import AutoConfig, Gemma3TextConfig

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
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope_parameters",
        ),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "hidden_activation"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding_window"),
        ({"model_type": "llama", "layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ],
)
def test_unsupported_setting_is_named_by_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^here: {key}: "):
        Architecture.from_config(MOE | {"model_type": "qwen3"} | changes, "here")


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4}, ()),
        ({"use_sliding_window": False, "sliding_window": 128}, ()),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 3}, (None, None, None, 128)),
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "mixtral", "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, (16,) * 4),
        ({"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2}, (8, None, 8, None)),
    ],
)
def test_windows_are_read_as_transformers_reads_them(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    model = Architecture.from_config(DENSE | changes)
    assert model.windows == windows
    known = AutoConfig.for_model(**(DENSE | changes))
    sizes = {"sliding_attention": known.sliding_window, "full_attention": None}
    default = ["sliding_attention"] * 4  # of families in which all layers are alike
    assert tuple(sizes[kind] for kind in vars(known).get("layer_types") or default) == (windows or (None,) * 4)


def test_gemma_with_images_is_read_with_the_defaults_of_its_text_config() -> None:
    published = {  # text_config of google/gemma-3-4b-it
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    model, known = Architecture.from_config(published), Gemma3TextConfig(**published)
    assert (model.vocab_size, model.num_attention_heads, model.num_key_value_heads) == (262208, 8, 4)
    assert (model.head_dim, model.query_size, model.tie_word_embeddings) == (256, 256, True)
    assert [size is None for size in model.windows] == [kind == "full_attention" for kind in known.layer_types]
    assert known.rope_parameters["full_attention"]["rope_theta"] == model.rope_theta == 1e6
    assert known.rope_parameters["sliding_attention"]["rope_theta"] == model.rotary.local_theta == 1e4
    assert model.rotary.scaling == 8.0


def test_error_of_an_unknown_family_names_the_families_and_the_engines() -> None:
    with pytest.raises(ConfigError, match=r"'gpt2' .*llama, .*olmo2; set strategy=fsdp2 .*strategy=hf"):
        Architecture.from_config({"model_type": "gpt2"})


def test_missing_key_is_named() -> None:
    config = {k: v for k, v in DENSE.items() if k != "hidden_size"}
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        Architecture.from_config(config)
