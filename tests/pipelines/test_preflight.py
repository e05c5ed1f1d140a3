"""Checks before anything is loaded; tests/e2e/test_bad_input.py tests them from the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from composed import load_config

from roll_gspo.errors import ConfigError, DataError
from roll_gspo.pipelines.preflight import check_data_files, check_models, preflight
from roll_gspo.pipelines.pretrain import check_model_name


@pytest.mark.parametrize("example", ["example_gspo", "example_grpo"])
@pytest.mark.parametrize("strategy", ["hf", "megatron"])
def test_shipped_examples_have_nothing_to_mend(example: str, strategy: str) -> None:
    if strategy == "megatron":
        for package in ("megatron", "vllm"):  # looked for, not imported: the strategies do that in their own way
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
    preflight(load_config(example, f"strategy={strategy}").config)


@pytest.mark.parametrize("name", ["builtin:tiny_qwen3", "Qwen/Qwen2.5-7B", "gpt2", "a.b_c/d-1.5B"])
def test_names_that_can_be_models(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:qwen", r"unknown builtin model 'qwen'.*known: tiny_qwen3, tiny_qwen3_moe"),
        ("/no/such/folder", "no folder '/no/such/folder'"),
        ("../models/mine", "no folder"),
        ("a/b/c", "no folder"),
        ("{file}", "is a file"),
        ("{folder}", "has no config.json"),
    ],
)
def test_names_that_cannot_be_models(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=message):
        check_model_name(name.format(file=tmp_path / "model.safetensors", folder=tmp_path))


def test_model_of_the_reference_counts_where_there_is_one() -> None:
    wrong = "reference.model_args.model_name_or_path=builtin:nothing"
    with pytest.raises(ConfigError, match="'nothing'"):
        check_models(load_config("example_gspo", wrong).config)
    check_models(load_config("example_gspo", wrong, "use_kl_loss=false", "kl_loss_coef=0").config)


def test_every_missing_file_is_listed_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").touch()
    train = f"actor_train.data_args.file_name=[{tmp_path}/there.jsonl,{tmp_path}/gone.jsonl]"
    config = load_config("example_gspo", train, f"validation.data_args.file_name={tmp_path}/lost.jsonl").config
    with pytest.raises(DataError) as error:
        check_data_files(config)
    first, second = str(error.value).splitlines()
    assert first.startswith(f"actor_train.data_args.file_name: {tmp_path}/gone.jsonl cannot be read (no such file)")
    assert second.startswith(f"validation.data_args.file_name: {tmp_path}/lost.jsonl")
