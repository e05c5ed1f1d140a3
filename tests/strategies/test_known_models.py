"""Architectures that the installed engines know, read without importing them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roll_gspo.config.strategy import StrategyArgs, args_class
from roll_gspo.errors import ConfigError
from roll_gspo.strategies.known_models import check_family, check_vllm, engines_that_know, unknown_to_vllm

TRANSFORMERS = "fsdp2_train, hf_train, hf_infer"


def folder_of(folder: Path, model_type: str, architecture: str) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    return str(folder)


@pytest.mark.parametrize(
    ("model_type", "architecture", "engines"),
    [
        ("gpt_oss", "GptOssForCausalLM", f"engines that know it: {TRANSFORMERS}, vllm"),
        ("biogpt", "BioGptForCausalLM", f"engines that know it: {TRANSFORMERS}"),
        ("zebra7", "GptOssForCausalLM", "engines that know it: vllm"),
        ("zebra7", "ZebraForCausalLM", "no engine knows it"),
    ],
)
def test_engines_are_named(tmp_path: Path, model_type: str, architecture: str, engines: str) -> None:
    assert engines_that_know(folder_of(tmp_path, model_type, architecture)) == engines


def test_builtin_models_are_known_to_all() -> None:
    assert engines_that_know("builtin:tiny_qwen3") == f"engines that know it: megatron_train, {TRANSFORMERS}, vllm"


def test_unknown_architectures_are_refused_with_the_engines_that_know_them(tmp_path: Path) -> None:
    model = folder_of(tmp_path, "zebra7", "ZebraForCausalLM")
    with pytest.raises(ConfigError, match=r"config\.json: the architecture ZebraForCausalLM .*no engine knows it"):
        check_vllm(model)
    with pytest.raises(ConfigError, match=r"config\.json: model_type 'zebra7' .* \(engines that know it: vllm\)"):
        check_family(folder_of(tmp_path, "zebra7", "LlamaForCausalLM"))


def test_vllm_may_use_classes_of_transformers(tmp_path: Path) -> None:
    model = folder_of(tmp_path, "biogpt", "BioGptForCausalLM")
    check_vllm(model)
    assert unknown_to_vllm(model) == "BioGptForCausalLM"


@pytest.mark.parametrize("engine", ["hf_train", "hf_infer", "fsdp2_train", "fsdp2_infer"])
def test_attention_that_ignores_the_cap_of_scores_is_refused(engine: str, tmp_path: Path) -> None:
    config = {"model_type": "gemma2", "attn_logit_softcapping": 50.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for implementation, keys in (("sdpa", ["strategy_config.attn_implementation"]), ("eager", [])):
        options = {"strategy_name": engine, "strategy_config": {"attn_implementation": implementation}}
        args = args_class(engine, StrategyArgs).model_validate(options)
        assert [problem.key for problem in args.layout_problems(str(tmp_path), 1, False)] == keys
