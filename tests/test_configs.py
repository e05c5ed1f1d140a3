"""Every shipped example with every option of every group; names in YAML, schema and registries are one vocabulary."""

from __future__ import annotations

from typing import get_args

import pytest
from composed import load_config

from roll_gspo.config.algorithm import AdvEstimator, AlgorithmConfig, ImportanceSampling, LossAggMode
from roll_gspo.config.experiment import RunConfig
from roll_gspo.config.roles import REWARD_WORKERS, ROLL_REWARD_WORKERS
from roll_gspo.config.strategy import (
    STRATEGY_NAMES,
    HfInferArgs,
    HfTrainArgs,
    MegatronInferArgs,
    MegatronTrainArgs,
    VllmArgs,
)
from roll_gspo.execution import EXECUTORS
from roll_gspo.pipelines import PIPELINES
from roll_gspo.pipelines.plan import make_plan
from roll_gspo.rewards import REWARDS
from roll_gspo.run import shipped_folders
from roll_gspo.strategies import REQUIREMENTS, STRATEGIES
from roll_gspo.tracking.base import TRACKERS

EXAMPLES, GROUPS = shipped_folders()
EXAMPLE_NAMES = sorted(file.stem for file in EXAMPLES.glob("*.yaml"))
OPTIONS = {group.name: sorted(f.stem for f in group.glob("*.yaml")) for group in GROUPS.iterdir() if group.is_dir()}
ALGORITHM_GROUPS = {
    "adv_estimator": AdvEstimator,
    "importance_sampling": ImportanceSampling,
    "loss_agg_mode": LossAggMode,
}


LAYOUTS = OPTIONS.pop("layout")  # a layout belongs to one model and strategy, which choose it


@pytest.mark.parametrize("group", sorted(OPTIONS))
@pytest.mark.parametrize("example", EXAMPLE_NAMES)
def test_example_with_every_option_of_a_group_validates_and_has_a_plan(example: str, group: str) -> None:
    for option in OPTIONS[group]:
        loaded = load_config(example, f"{group}={option}")
        assert loaded.warnings == ()
        plan = make_plan(loaded.config, loaded.warnings)
        assert loaded.config.exp_name in plan.text()
        if group in ALGORITHM_GROUPS:
            assert getattr(loaded.config, group) == option


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_layout_follows_model_and_strategy(model: str) -> None:
    for strategy in OPTIONS["strategy"]:
        config = load_config("example_gspo", f"model={model}", f"strategy={strategy}").config
        devices = config.actor_train.device_mapping
        assert (devices is not None) == (f"{model}-{strategy}" in LAYOUTS)
        assert config.updates_per_rollout == 4, "the layout keeps the model's mini-batch"


def test_layouts_are_named_after_model_and_strategy() -> None:
    pairs = {f"{model}-{strategy}" for model in OPTIONS["model"] for strategy in OPTIONS["strategy"]}
    assert set(LAYOUTS) - {"single"} <= pairs


@pytest.mark.parametrize("example", EXAMPLE_NAMES)
def test_layout_single_makes_every_example_runnable(example: str) -> None:
    assert make_plan(load_config(example, "layout=single").config).not_runnable == ()


@pytest.mark.parametrize("importance_sampling", get_args(ImportanceSampling))
def test_algorithm_choices_combine_freely(importance_sampling: str) -> None:
    for adv_estimator in get_args(AdvEstimator):
        for loss_agg_mode in get_args(LossAggMode):
            chosen = {
                "importance_sampling": importance_sampling,
                "adv_estimator": adv_estimator,
                "loss_agg_mode": loss_agg_mode,
            }
            config = load_config("example_gspo", *(f"{k}={v}" for k, v in chosen.items())).config
            assert chosen == config.model_dump(include=set(chosen))


@pytest.mark.parametrize("group", sorted(ALGORITHM_GROUPS))
def test_options_of_a_group_are_the_values_of_its_key(group: str) -> None:
    assert set(OPTIONS[group]) == set(get_args(ALGORITHM_GROUPS[group]))


def test_tracker_options_are_the_values_of_track_with() -> None:
    assert set(OPTIONS["tracker"]) == set(get_args(RunConfig.model_fields["track_with"].annotation))


@pytest.mark.parametrize("group", sorted(ALGORITHM_GROUPS))
def test_base_yaml_chooses_the_default_of_the_schema(group: str) -> None:
    assert getattr(load_config("base").config, group) == AlgorithmConfig.model_fields[group].default


def test_schema_and_registries_have_the_same_names() -> None:
    blocks = (MegatronTrainArgs, HfTrainArgs, MegatronInferArgs, HfInferArgs, VllmArgs)
    names = {get_args(block.model_fields["strategy_name"].annotation)[0] for block in blocks}
    assert set(STRATEGIES) == names == set(STRATEGY_NAMES) == set(REQUIREMENTS)
    assert set(PIPELINES) == set(get_args(RunConfig.model_fields["pipeline"].annotation))
    assert set(TRACKERS) == set(get_args(RunConfig.model_fields["track_with"].annotation))
    assert set(EXECUTORS) <= set(get_args(RunConfig.model_fields["execution"].annotation))
    assert set(REWARDS) == set(REWARD_WORKERS) == {*REWARD_WORKERS, *ROLL_REWARD_WORKERS.values()}


def test_execution_names_without_an_executor_cannot_run() -> None:
    for name in set(get_args(RunConfig.model_fields["execution"].annotation)) - set(EXECUTORS):
        config = load_config("example_gspo", f"execution={name}").config
        assert any(f"execution: {name}" in text for text in make_plan(config).not_runnable)


def test_example_gspo_has_the_values_of_rolls_gspo_page() -> None:
    page = {
        "seed": 42,
        "adv_estimator": "reinforce",
        "importance_sampling": "seq",
        "ppo_epochs": 1,
        "use_kl_loss": True,
        "kl_loss_coef": 0.001,
        "loss_agg_mode": "seq-mean-token-sum",
        "whiten_advantages": True,
        "advantage_clip": 2.0,
        "dual_clip_loss": True,
        "reward_clip": 10,
        "reward_norm": None,
        "reward_shift": False,
        "reward_scale": False,
        "add_token_level_kl": False,
    }
    sizes = {"rollout_batch_size", "num_return_sequences_in_group", "prompt_length", "response_length"}
    config = load_config("example_gspo").config
    assert config.model_dump(include=set(page)) == page
    assert sizes <= config.model_fields_set
    assert config.clip_range == (3e-4, 4e-4)


def test_example_gspo_is_real_training_and_not_one_update_a_rollout() -> None:
    config = load_config("example_gspo").config
    assert (config.updates_per_rollout, config.mini_batch_size, config.samples_per_rollout) == (4, 64, 256)


def test_example_grpo_differs_from_example_gspo_in_the_algorithm_only() -> None:
    gspo, grpo = (load_config(name).config.model_dump() for name in ("example_gspo", "example_grpo"))
    assert {key for key in gspo if gspo[key] != grpo[key]} == {
        *("exp_name", "adv_estimator", "importance_sampling", "loss_agg_mode", "whiten_advantages"),
        *("pg_clip_low", "pg_clip_high"),
    }
    assert (grpo["adv_estimator"], grpo["pg_clip_low"], grpo["pg_clip_high"]) == ("grpo", 0.2, 0.27)


def test_example_7b_has_the_sizes_of_rolls_gspo_page() -> None:
    config = load_config("qwen2.5_7b_gspo").config
    assert (config.rollout_batch_size, config.num_return_sequences_in_group) == (64, 8)
    assert (config.prompt_length, config.max_response_length, config.max_sequence_length) == (2048, 4096, 6144)


@pytest.mark.parametrize("group", ["model", "strategy", "data"])
def test_group_options_leave_the_algorithm_alone(group: str) -> None:
    for option in OPTIONS[group]:
        config = load_config("example_gspo", f"{group}={option}").config
        assert (config.importance_sampling, config.clip_range) == ("seq", (3e-4, 4e-4))
