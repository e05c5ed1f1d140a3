"""Rules between the keys of the algorithm, and options of its groups against the lines of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from composed import load_config
from config_problems import derived_config, problem_of, problems_of

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.legacy import IGNORED_WITHOUT

ONE_MICRO_BATCH = "actor_train.training_args.gradient_accumulation_steps=1"


@pytest.mark.parametrize(
    ("overrides", "key", "values"),
    [
        (
            ("lambd=0.9", "adv_estimator=rloo", "value_clip=0.1", "critic_warmup=2"),
            "critic_warmup",
            ("adv_estimator", "gae"),
        ),
        (("adv_estimator=gae", "~critic"), "adv_estimator", ("gae", "adv_estimator")),
        (("adv_estimator=gae", "critic_warmup=80"), "critic_warmup", ("80", "max_steps")),
        (
            ("adv_estimator=gae", "critic.training_args.gradient_accumulation_steps=3"),
            "rollout_batch_size",
            ("256", "96", "critic.training_args.gradient_accumulation_steps", "3"),
        ),
        (
            ("adv_estimator=gae", "critic.strategy_args.strategy_config.fp32_lm_head=true"),
            "critic.strategy_args.strategy_config.fp32_lm_head",
            ("critic", "remove it"),
        ),
        (
            ("adv_estimator=gae", "critic.strategy_args.strategy_config.fused_head=torch"),
            "critic.strategy_args.strategy_config.fused_head",
            ("critic", "remove it"),
        ),
        (
            ("adv_estimator=gae", "strategy=hf", "critic.strategy_args.strategy_config.fp32_lm_head=false"),
            "critic.strategy_args.strategy_config.fp32_lm_head",
            ("critic", "remove it"),
        ),
        (
            ("adv_estimator=gae", "critic.strategy_args.strategy_config.tensor_model_parallel_size=2"),
            "critic.device_mapping",
            ("1", "2", "tensor_model_parallel_size"),
        ),
        (("adv_estimator=gae", "critic.model_args.dtype=fp16"), "critic.model_args.dtype", ("fp16", "bf16", "fp32")),
        (
            ("staleness_gate={action: skip}", "enable_old_logprobs_recompute=false"),
            "staleness_gate",
            ("enable_old_logprobs_recompute", "staleness_gate: null"),
        ),
        (("policy_loss=gmpo",), "policy_loss", ("gmpo", "importance_sampling", "seq")),
        (("policy_loss=topr",), "policy_loss", ("topr", "importance_sampling", "seq")),
        (("policy_loss=fspo",), "policy_loss", ("fspo", "importance_sampling", "seq")),
        (("vespo_k_positive=1.0",), "vespo_k_positive", ("policy_loss", "vespo")),
        (("dppo_threshold=0.2",), "dppo_threshold", ("policy_loss", "dppo")),
        (
            ("importance_sampling=token", "pg_clip_length_scaling=true"),
            "pg_clip_length_scaling",
            ("importance_sampling", "token", "seq"),
        ),
        (("policy_loss=sapo", "pg_clip_length_scaling=true"), "pg_clip_length_scaling", ("policy_loss", "clip")),
        (("adv_estimator=maxrl", "reward_norm=batch"), "reward_norm", ("maxrl", "batch", "null")),
        (
            ("token_mask=top_entropy", "old_log_probs=rollout"),
            "top_entropy_quantile",
            ("0.2", "enable_old_logprobs_recompute"),
        ),
        (("policy_loss=sapo", "pg_clip=0.1"), "pg_clip", ("policy_loss", "clip", "cispo")),
        (
            ("policy_loss=cispo", "dual_clip_loss=true"),
            "dual_clip_loss",
            ("policy_loss", "clip", "cispo"),
        ),
        (("sapo_tau_positive=2.0",), "sapo_tau_positive", ("policy_loss", "sapo")),
        (("sapo_tau_negative=2.0",), "sapo_tau_negative", ("policy_loss", "sapo")),
        (("overlong_penalty_factor=2.0",), "overlong_penalty_factor", ("overlong_buffer_length",)),
        (("overlong_buffer_length=48",), "overlong_buffer_length", ("48", "response_length")),
        (
            ("difficulty_mask=true", "difficulty_low_threshold=0.9", "difficulty_high_threshold=0.1"),
            "difficulty_low_threshold",
            ("0.9", "difficulty_high_threshold", "0.1"),
        ),
        (
            ("difficulty_mask=true", "num_return_sequences_in_group=1", ONE_MICRO_BATCH),
            "difficulty_mask",
            ("true", "num_return_sequences_in_group", "2"),
        ),
        (
            ("max_sampling_rounds=3",),
            "max_sampling_rounds",
            ("query_filter_config.type", "std_filter", "mean_filter"),
        ),
        (
            ("query_filter=std_filter", "num_return_sequences_in_group=1", ONE_MICRO_BATCH),
            "query_filter_config",
            ("num_return_sequences_in_group", "2"),
        ),
        (
            ("query_filter=mean_filter", "query_filter_config.filter_args.std_threshold=0.1"),
            "query_filter_config.filter_args.std_threshold",
            ("std_filter",),
        ),
        (
            ("query_filter=std_filter", "query_filter_config.filter_args.threshold_up=1"),
            "query_filter_config.filter_args.threshold_up",
            ("mean_filter",),
        ),
        (
            ("query_filter=mean_filter", "query_filter_config.filter_args.threshold_up=null"),
            "query_filter_config.filter_args.threshold_up",
            ("mean_filter",),
        ),
        (
            ("query_filter=mean_filter", "query_filter_config.filter_args.threshold_up=0"),
            "query_filter_config.filter_args.threshold_down",
            ("0.1", "filter_args.threshold_up", "0"),
        ),
        (
            ("train_infer_correction=token_truncate", "old_log_probs=rollout"),
            "train_infer_correction",
            ("enable_old_logprobs_recompute", "false", "1"),
        ),
        (
            ("train_infer_correction=token_mask", "train_infer_correction.lower_bound=5"),
            "train_infer_correction.lower_bound",
            ("5", "upper_bound"),
        ),
        (("train_infer_correction.level=token",), "train_infer_correction.mode", ()),
        (
            ("router_replay=R2", "strategy=hf"),
            "actor_train.router_replay.mode",
            ("R2", "hf_train", "megatron_train"),
        ),
        (
            ("router_replay=R3", "actor_infer.strategy_args.strategy_name=hf_infer"),
            "actor_train.router_replay.mode",
            ("R3", "actor_infer.strategy_args.strategy_name", "hf_infer"),
        ),
        (
            ("router_replay=record", "actor_infer.strategy_args.strategy_name=hf_infer"),
            "actor_train.router_replay.record",
            ("true", "actor_infer.strategy_args.strategy_name", "hf_infer"),
        ),
        (
            ("router_replay=R2", "old_log_probs=rollout"),
            "actor_train.router_replay.mode",
            ("R2", "enable_old_logprobs_recompute", "false"),
        ),
    ],
)
def test_broken_rule_of_the_algorithm_has_key_values_and_location(
    overrides: tuple[str, ...], key: str, values: tuple[str, ...]
) -> None:
    problem = problem_of(*overrides)
    assert problem.key == key and problem.names(*values)
    assert problem.where.startswith(("command line (", "conf/", "examples/")) or "missing" in problem.message


@pytest.mark.parametrize(
    "estimator", ["grpo", "dr_grpo", "rloo", "opo", "raft_plus_plus", "reinforce_plus_plus_baseline"]
)
def test_groups_of_one_sample_refuse_estimators_that_compare(estimator: str) -> None:
    overrides = ("num_return_sequences_in_group=1", ONE_MICRO_BATCH, f"adv_estimator={estimator}")
    problem = problem_of(*overrides)
    assert problem.key == "adv_estimator" and problem.names(estimator, "num_return_sequences_in_group")


@pytest.mark.parametrize("estimator", ["reinforce", "reinforce_plus_plus", "gae"])
def test_groups_of_one_sample_are_enough_for_other_estimators(estimator: str) -> None:
    overrides = ("num_return_sequences_in_group=1", ONE_MICRO_BATCH, f"adv_estimator={estimator}")
    assert load_config("example_gspo", *overrides, "gamma=0.9").config.gamma == 0.9


@pytest.mark.parametrize("policy_loss", ["sapo", "topr", "vespo", "dppo"])
def test_objectives_without_a_clip_have_no_clip_range(policy_loss: str) -> None:
    config = load_config("example_gspo", f"policy_loss={policy_loss}", "importance_sampling=token").config
    assert (config.clip_range, config.effective_dual_clip_ratio) == (None, None)


def test_critic_follows_the_actor_and_may_say_otherwise() -> None:
    config = load_config("example_gspo", "adv_estimator=gae", "strategy=hf", "critic.training_args.learning_rate=3e-4")
    critic, actor = config.config.critic, config.config.actor_train
    assert critic is not None
    assert critic.strategy_args == actor.strategy_args and critic.model_args == actor.model_args
    assert (critic.infer_batch_size, critic.training_args.learning_rate) == (actor.infer_batch_size, 3e-4)
    assert config.config.critic_updates_per_rollout == config.config.updates_per_rollout == 4
    own = load_config("example_gspo", "adv_estimator=gae", "critic.strategy_args.strategy_name=hf_train").config
    assert own.critic is not None
    assert own.critic.strategy_args.strategy_name == "hf_train"
    assert own.actor_train.strategy_args.strategy_name == "megatron_train"


def test_critic_of_a_large_model_follows_its_layout() -> None:
    config = load_config("qwen2.5_7b_gspo", "adv_estimator=gae").config
    assert config.critic is not None
    assert config.critic.device_mapping == config.actor_train.device_mapping == tuple(range(8))
    assert config.critic.strategy_args == config.actor_train.strategy_args
    assert (config.critic_mini_batch_size, config.critic.training_args.learning_rate) == (128, 1e-5)
    larger = load_config(
        "qwen2.5_7b_gspo", "adv_estimator=gae", "critic.strategy_args.strategy_config.tensor_model_parallel_size=4"
    ).config
    assert larger.critic is not None and larger.critic_data_parallel_size == 2
    assert larger.data_parallel_size == 4, "the actor's layout is its own"


def test_critic_block_without_gae_is_accepted_and_not_built() -> None:
    critic = "{training_args:{learning_rate:1e-3},strategy_args:{strategy_name:hf_train}}"
    loaded = load_config("example_gspo", f"+critic={critic}")
    assert loaded.warnings == () and loaded.config.critic is not None and not loaded.config.needs_critic


def test_blocks_are_written_key_by_key_or_whole_on_the_command_line() -> None:
    keys = ("train_infer_correction.level=geometric", "train_infer_correction.mode=mask")
    whole = ("+train_infer_correction={level:geometric,mode:mask}",)
    option = ("train_infer_correction=geometric_mask", "train_infer_correction.lower_bound=0.0")
    for overrides in (keys, whole, (*option, "train_infer_correction.upper_bound=2.0")):
        correction = load_config("example_gspo", *overrides).config.train_infer_correction
        assert correction is not None
        assert correction.model_dump() == {"level": "geometric", "mode": "mask", "lower_bound": 0, "upper_bound": 2}


def test_policy_loss_cispo_may_have_no_lower_bound() -> None:
    assert load_config("example_cispo").config.clip_range == (1.0, 4.0)
    problem = problem_of("pg_clip_low=1.1", name="example_cispo")
    assert problem.key == "pg_clip_low" and problem.names(1, 1.1)


def test_option_none_that_the_body_overrides_is_refused_only_where_someone_chose_it(tmp_path: Path) -> None:
    folder = derived_config(tmp_path, "reward_norm: batch\n")
    assert load_config("mine", config_dir=folder).config.reward_norm == "batch"
    problem = problem_of("reward_norm=none", name="mine", config_dir=folder)
    assert problem.where.endswith("mine.yaml:3") and problem.key == "reward_norm" and problem.names("none", "batch")
    folder = derived_config(tmp_path, "reward_norm: null\ntrain_infer_correction: null\n")
    norm, correction = problems_of("mine", "reward_norm=group", "train_infer_correction=token_mask", config_dir=folder)
    assert norm.key == "reward_norm" and norm.names("group", "null")
    assert correction.key == "train_infer_correction" and correction.names("token_mask", "null")


def test_body_may_refine_a_block_that_a_group_chose(tmp_path: Path) -> None:
    folder = derived_config(tmp_path, "train_infer_correction: {upper_bound: 3.0}\n")
    correction = load_config("mine", "train_infer_correction=token_truncate", config_dir=folder)
    assert correction.config.train_infer_correction is not None
    assert correction.config.train_infer_correction.upper_bound == 3


@pytest.mark.parametrize("key", sorted(IGNORED_WITHOUT))
def test_keys_that_rolls_files_carry_without_their_switch_are_warned_of(key: str) -> None:
    switch, value = IGNORED_WITHOUT[key]
    (warning,) = load_config("example_gspo", f"{key}=0.5").warnings
    assert f"{key} (command line" in warning and f"{switch}: {str(value).lower()}" in warning
    config = load_config("example_gspo", f"{key}=0.5", f"{switch}={str(value).lower()}")
    assert (config.warnings, config.config.model_dump()[key]) == ((), 0.5)


def test_keys_without_their_switch_are_refused_by_the_schema() -> None:
    values = load_config("example_gspo").config.model_dump()
    for key in IGNORED_WITHOUT:
        with pytest.raises(ValueError, match=f"{key}: "):
            ExperimentConfig.model_validate(values | {key: 0.5})
