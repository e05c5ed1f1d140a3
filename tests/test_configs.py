"""Every shipped example with every option of every group; names in YAML, schema and registries are one vocabulary."""

from __future__ import annotations

from functools import cache
from typing import get_args

import pytest
from composed import load_config
from pydantic import BaseModel

from roll_gspo.algorithms.aggregate import LOSS_AGG_MODES
from roll_gspo.algorithms.correction import CORRECTION_LEVELS, CORRECTION_MODES
from roll_gspo.algorithms.kl import KL_ESTIMATORS
from roll_gspo.algorithms.query_filter import QUERY_FILTERS
from roll_gspo.algorithms.reward_norm import REWARD_NORMS
from roll_gspo.config.algorithm import (
    AlgorithmConfig,
    KlEstimator,
    LossAggMode,
    RewardNorm,
)
from roll_gspo.config.roles import RouterReplayConfig
from roll_gspo.config.run import RunConfig
from roll_gspo.config.selection import QueryFilterConfig, TrainInferCorrectionConfig
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.config.trackers import TRACKERS
from roll_gspo.declarations import EXTENSIBLE
from roll_gspo.errors import ConfigError
from roll_gspo.execution import EXECUTORS
from roll_gspo.pipelines.plan import make_plan
from roll_gspo.run import shipped_folders

EXAMPLES, GROUPS = shipped_folders()
EXAMPLE_NAMES = sorted(file.stem for file in EXAMPLES.glob("*.yaml"))
OPTIONS = {group.name: sorted(f.stem for f in group.glob("*.yaml")) for group in GROUPS.iterdir() if group.is_dir()}
ALGORITHM_GROUPS: dict[str, set[str]] = {
    **{key: set(functions) for key, functions in EXTENSIBLE.items()},
    "loss_agg_mode": set(get_args(LossAggMode)),
    "reward_norm": set(get_args(RewardNorm)),
}

SFT, GROUPS_OF_SFT = "example_sft", ("data", "model", "strategy", "tracker")
LAYOUTS = OPTIONS.pop("layout")  # a layout belongs to one model and strategy, which choose it
assert OPTIONS.pop("sft") == OPTIONS["model"], "every model has sizes of supervised fine-tuning"


def is_refused(config: AnyConfig, group: str, option: str) -> str | None:
    """The key that the refusal of `option` beside the choices of `config` names; None where it has to work."""
    if isinstance(config, SftConfig):
        return None
    level = option if group == "importance_sampling" else config.importance_sampling
    loss = option if group == "policy_loss" else config.policy_loss
    if EXTENSIBLE["policy_loss"].declaration(loss).own_ratio and level != "token":
        return "policy_loss"
    estimator = option if group == "adv_estimator" else config.adv_estimator
    normalises = EXTENSIBLE["adv_estimator"].declaration(estimator).normalises_scores
    if normalises and (option != "none" if group == "reward_norm" else config.reward_norm is not None):
        return "reward_norm"
    if group == "token_mask" and option != "none" and not config.enable_old_logprobs_recompute:
        return "top_entropy_quantile"
    args = config.actor_train.strategy_args
    if group == "router_replay" and option != "none" and args.can_replay_routing:
        return "actor_train" if args.replay_conflicts else None
    return None


def is_not_runnable(config: AnyConfig, group: str, option: str) -> str | None:
    """The key that the plan names as what cannot run; None where it says nothing new."""
    is_dense = config.pretrain == "builtin:tiny_qwen3"
    return "actor_train.router_replay" if group == "router_replay" and option != "none" and is_dense else None


@cache
def config_of(example: str) -> AnyConfig:
    """A shipped example as it is."""
    return load_config(example).config


# The other examples are example_gspo with another option of the group `algorithm`: see test_presets.py.
VARIED = ("example_gspo", SFT, "qwen3_30b_a3b_gspo")
CASES = [
    pytest.param(example, group, marks=[] if example in VARIED else pytest.mark.long)
    for example in EXAMPLE_NAMES
    for group in (GROUPS_OF_SFT if example == SFT else sorted(OPTIONS))
    if group != "algorithm" or not example.startswith("example_")
]


@pytest.mark.parametrize(("example", "group"), CASES)
def test_example_with_every_option_of_a_group_has_a_plan_or_a_reason(example: str, group: str) -> None:
    alone = config_of(example)
    for option in OPTIONS[group]:
        if key := is_refused(alone, group, option):
            with pytest.raises(ConfigError, match=rf": {key}[\w.]*: .*; "):
                load_config(example, f"{group}={option}")
            continue
        loaded = load_config(example, f"{group}={option}")
        assert loaded.warnings == ()
        plan = make_plan(loaded.config, loaded.warnings)
        assert loaded.config.exp_name in plan.text()
        if group in ALGORITHM_GROUPS:
            assert loaded.config.model_dump()[group] == (None if option == "none" else option)
        key = is_not_runnable(loaded.config, group, option)
        assert [problem for problem in plan.not_runnable if key and problem.key.startswith(key)] or not key


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_layout_follows_model_and_strategy(model: str) -> None:
    for strategy in OPTIONS["strategy"]:
        config = load_config("example_gspo", f"model={model}", f"strategy={strategy}").config
        devices = config.actor_train.device_mapping
        assert (devices is not None) == (f"{model}-{strategy}" in LAYOUTS)
        assert config.updates_per_rollout == 4, "the layout keeps the model's mini-batch"


def test_layouts_are_named_after_model_and_strategy() -> None:
    pairs = {f"{model}-{strategy}" for model in OPTIONS["model"] for strategy in OPTIONS["strategy"]}
    separate = {f"{model}-separate" for model in OPTIONS["model"]}
    assert set(LAYOUTS) - {"single", "two_ranks"} <= pairs | separate


@pytest.mark.parametrize("example", EXAMPLE_NAMES)
def test_layout_single_makes_every_example_runnable(example: str) -> None:
    assert make_plan(load_config(example, "layout=single").config).not_runnable == ()


@pytest.mark.parametrize("group", sorted(ALGORITHM_GROUPS))
def test_options_of_a_group_are_the_values_of_its_key(group: str) -> None:
    none = {"none"} if AlgorithmConfig.model_fields[group].default is None else set()
    assert set(OPTIONS[group]) == ALGORITHM_GROUPS[group] | none


def test_options_of_blocks_are_the_values_of_their_switch() -> None:
    filters = set(get_args(QueryFilterConfig.model_fields["type"].annotation))
    assert set(OPTIONS["query_filter"]) == filters - {"no_filter"} | {"none"}
    modes = set(get_args(RouterReplayConfig.model_fields["mode"].annotation))
    assert set(OPTIONS["router_replay"]) == modes - {"disable"} | {"none", "record"}


def test_tracker_options_are_the_values_of_track_with() -> None:
    assert set(OPTIONS["tracker"]) == {*TRACKERS, "none"}


def test_base_yaml_chooses_the_defaults_of_the_schema() -> None:
    config = load_config("base").config.model_dump(include=set(AlgorithmConfig.model_fields))
    values = {key: info.get_default(call_default_factory=True) for key, info in AlgorithmConfig.model_fields.items()}
    defaults = {key: v.model_dump() if isinstance(v, BaseModel) else v for key, v in values.items()}
    clip_range = {"use_pg_clip_range": True, "pg_clip_low": 0.2, "pg_clip_high": 0.27}  # of importance_sampling=token
    assert config == defaults | clip_range


def test_schema_and_registries_have_the_same_names() -> None:
    assert set(EXECUTORS) <= set(get_args(RunConfig.model_fields["execution"].annotation))


def test_schema_and_algorithms_have_the_same_names() -> None:
    assert set(get_args(LossAggMode)) == set(LOSS_AGG_MODES)
    assert set(get_args(RewardNorm)) == set(REWARD_NORMS)
    assert set(get_args(KlEstimator)) == set(KL_ESTIMATORS)
    assert set(get_args(QueryFilterConfig.model_fields["type"].annotation)) == set(QUERY_FILTERS)
    correction = TrainInferCorrectionConfig.model_fields
    assert set(get_args(correction["level"].annotation)) == set(CORRECTION_LEVELS)
    assert set(get_args(correction["mode"].annotation)) == set(CORRECTION_MODES)


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
