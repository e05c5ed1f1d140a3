"""Rules of `model_args.lora`: which roles and engines may have an adapter."""

from __future__ import annotations

import pytest
from composed import load_config
from config_problems import problem_of

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.lora import LoraArgs, adapter_sync
from roll_gspo.pipelines.settings import lora_setup

LORA = "actor_train.model_args.lora"


def test_megatron_refuses_an_adapter_and_names_the_alternatives() -> None:
    problem = problem_of(f"{LORA}.rank=8")
    assert problem.key == LORA and problem.names("megatron_train", "hf_train", "strategy_args.strategy_name")


@pytest.mark.parametrize("role", ["actor_infer", "reference", "critic"])
def test_only_the_trained_policy_has_an_adapter(role: str) -> None:
    problem = problem_of("strategy=hf", "adv_estimator=gae", f"{role}.model_args.lora.rank=8")
    assert problem.key == f"{role}.model_args.lora" and problem.names("actor_train")


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        ("dropout=1.0", "dropout", ("1",)),
        ("rank=0", "rank", ("0",)),
        ("target_modules=[]", "target_modules", ("all-linear",)),
        ("target_modules=[all-linear,q_proj]", "target_modules", ("q_proj",)),
        ("sync=adapter", "sync", ("hf_infer", "merged")),
    ],
)
def test_values_that_no_adapter_has(override: str, key: str, values: tuple[str, ...]) -> None:
    overrides = {"rank": "rank=8", **dict([override.split("=", 1)])}
    problem = problem_of(
        "strategy=hf",
        f"{LORA}.rank=8",
        *(f"{LORA}.{name}={value.removeprefix('rank=')}" for name, value in overrides.items()),
    )
    assert problem.key == f"{LORA}.{key}" and problem.names(*values)


def test_setup_of_an_adapter() -> None:
    config = load_config("example_gspo", "strategy=hf", f"{LORA}.rank=16", f"{LORA}.use_rslora=true").config
    setup = lora_setup(config)
    assert setup is not None
    assert (setup.alpha, setup.scale, setup.sync, setup.target_modules) == (32.0, 8.0, "merged", ("all-linear",))
    assert LoraArgs(rank=4, alpha=2.0).effective_alpha == 2.0


def test_an_engine_that_receives_adapters_gets_them_by_default() -> None:
    config = load_config("example_gspo").config
    assert isinstance(config, ExperimentConfig)
    engine = config.actor_infer.strategy_args
    assert adapter_sync(LoraArgs(rank=4), engine) == ("adapter" if engine.receives_adapters else "merged")
    assert adapter_sync(LoraArgs(rank=4, sync="merged"), engine) == "merged"


def test_the_reference_is_the_model_under_the_adapter() -> None:
    def config_of(*overrides: str) -> ExperimentConfig:
        config = load_config("example_gspo", "strategy=hf", "use_kl_loss=true", f"{LORA}.rank=8", *overrides).config
        assert isinstance(config, ExperimentConfig)
        return config

    assert config_of().reference_is_base and "reference" not in config_of().roles()
    other = config_of("reference.model_args.model_name_or_path=builtin:tiny_qwen3_moe")
    assert not other.reference_is_base and "reference" in other.roles()
