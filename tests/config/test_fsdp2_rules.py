"""Options of the FSDP2 engine that would have no effect are refused, and the plan knows where its state is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_problems import problem_of

from roll_gspo.strategies.fsdp2.args import Fsdp2InferArgs, Fsdp2TrainArgs
from roll_gspo.strategies.fsdp2.config import Fsdp2Config

FSDP2 = ("strategy=fsdp2",)
TRAIN, REFERENCE = (f"{role}.strategy_args.strategy_config" for role in ("actor_train", "reference"))


def model(folder: Path, **config: Any) -> str:
    """Write a `config.json` and return the folder."""
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def keys_of(model: str, **options: Any) -> list[str]:
    """Return the keys of the options that do not fit a model."""
    args = Fsdp2TrainArgs(strategy_name="fsdp2_train", strategy_config=Fsdp2Config(**options))
    return [problem.key.removeprefix("strategy_config.") for problem in args.layout_problems(model, 1, False)]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"{TRAIN}.use_sequence_packing=true {TRAIN}.attn_implementation=eager", f"{TRAIN}.attn_implementation"),
        (f"{REFERENCE}.gradient_checkpointing=true", f"{REFERENCE}.gradient_checkpointing"),
        (f"{REFERENCE}.reshard_after_forward=false", f"{REFERENCE}.reshard_after_forward"),
        (f"{REFERENCE}.cpu_offload=true", f"{REFERENCE}.cpu_offload"),
        (f"{REFERENCE}.grad_reduce_in_fp32=false", f"{REFERENCE}.grad_reduce_in_fp32"),
    ],
)
def test_options_without_an_effect_are_refused(override: str, key: str) -> None:
    assert problem_of(*FSDP2, *override.split()).key == key


def test_options_must_fit_the_family(tmp_path: Path) -> None:
    llama, cohere = tmp_path / "llama", tmp_path / "cohere"
    nested, other = tmp_path / "nested", tmp_path / "other"
    for folder in (llama, cohere, nested, other):
        folder.mkdir()
    options = {"use_sequence_packing": True, "fused_head": "torch"}
    assert keys_of(model(llama, model_type="llama"), **options) == []
    assert keys_of(model(cohere, model_type="cohere"), **options) == ["fused_head"]
    assert keys_of(model(other, model_type="gemma2"), **options) == ["use_sequence_packing", "fused_head"]
    images = model(nested, model_type="gemma3", text_config={"model_type": "gemma3_text"})
    assert keys_of(images, **options) == ["use_sequence_packing", "fused_head"]
    on_gpus = [Fsdp2InferArgs(strategy_name="fsdp2_infer").on_device(True, name) for name in (str(llama), images)]
    assert [args.packs_samples for args in on_gpus] == [True, False]


def test_offloaded_state_is_not_on_the_device() -> None:
    kept, offloaded = (
        Fsdp2TrainArgs(strategy_name="fsdp2_train", strategy_config=Fsdp2Config(cpu_offload=offload))
        for offload in (False, True)
    )
    name = "Qwen/Qwen2.5-7B"
    (first, second) = kept.parameters_per_device(name, 2, value_head=False) or ()
    assert first == second and first.weights == first.optimizer > 3.8e9
    assert {tuple(held) for held in offloaded.parameters_per_device(name, 2, value_head=False) or ()} == {(0.0, 0.0)}
    assert any("strategy_config.cpu_offload" in other.changes for other in kept.alternatives(name, 2))
