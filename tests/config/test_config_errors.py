"""Error messages of invalid configurations: every problem, its location and its fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from composed import load_config
from config_problems import derived_config, problem_of, problems_of

from roll_gspo.config.base import parse_device_mapping
from roll_gspo.config.legacy import IGNORED, NOT_SUPPORTED_YET, ROLES
from roll_gspo.config.load import known_keys
from roll_gspo.pipelines.plan import make_plan
from roll_gspo.strategies.hf.config import HfConfig

HERE = Path(__file__).parent


def test_unknown_key_in_a_file_has_line_path_and_nearest_key(tmp_path: Path) -> None:
    folder = derived_config(tmp_path, "exp_name: mine\nactor_train:\n  training_args:\n    learnin_rate: 1e-4\n")
    problem = problem_of(name="mine", config_dir=folder)
    assert problem.where.endswith("mine.yaml:6") and problem.key == "actor_train.training_args.learnin_rate"
    assert problem.names("learning_rate")


def test_missing_key_beside_its_misspelt_twin_is_one_problem(tmp_path: Path) -> None:
    text = "rewards:\n  column_addition:\n    worker_clas: exact_match\n"
    (tmp_path / "mine.yaml").write_text(f"defaults:\n  - example_gspo\n  - override data: gsm8k\n  - _self_\n{text}")
    problem = problem_of(name="mine", config_dir=tmp_path)
    assert problem.where.endswith("mine.yaml:7") and problem.key == "rewards.column_addition.worker_clas"
    assert problem.names("worker_cls")


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_unknown_key_on_the_command_line_is_located_there(prefix: str) -> None:
    problem = problem_of(f"{prefix}importance_samplin=token")
    assert problem[:2] == ("command line (importance_samplin=token)", "importance_samplin")
    assert problem.names("importance_sampling")


def test_unknown_key_without_a_near_one_lists_the_known_ones() -> None:
    assert problem_of("actor_infer.model_args.quux=1").names("dtype", "model_name_or_path")


def test_unknown_engine_key_names_only_keys_of_that_engine() -> None:
    problem = problem_of("actor_train.strategy_args.strategy_config.attn_implementation=eager")
    assert problem.names("recompute_granularity") and not problem.names("generate_batch_size")
    values = {"actor_train": {"strategy_args": {"strategy_name": "hf_train"}}}
    path = ("actor_train", "strategy_args", "strategy_config")
    assert known_keys(path, values) == sorted(HfConfig.model_fields)


def test_reward_domain_may_be_named_like_an_engine() -> None:
    problem = problem_of("rewards.vllm.worker_cls=exact_match", "rewards.vllm.wrld_size=2")
    assert problem.key == "rewards.vllm.wrld_size" and problem.names("world_size")


def test_problems_come_together_in_the_order_of_lines(tmp_path: Path) -> None:
    lines = [f"unknown_{i}: 1" for i in range(9)]
    folder = derived_config(tmp_path, "\n".join([*lines, "max_steps: many", "pg_clip: 2"]))
    problems = problems_of("mine", config_dir=folder)
    numbers = [int(problem.where.rpartition(":")[2]) for problem in problems]
    assert numbers == sorted(numbers) == list(range(3, 14))


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        ("max_steps=a", "max_steps", ("integer", "a")),
        ("max_steps=1.5", "max_steps", ("integer", "1.5")),
        ("max_steps=true", "max_steps", ("integer", True)),
        ("max_steps=0", "max_steps", ("0",)),
        ("use_kl_loss=1", "use_kl_loss", ("boolean", "1")),
        ("exp_name=2024", "exp_name", ("string", "2024", "quotes")),
        ("pg_clip=1", "pg_clip", ("1",)),
        ("gamma=0", "gamma", ("0",)),
        ("actor_infer=3", "actor_infer", ("3",)),
        ("actor_train.strategy_args=hf_train", "actor_train.strategy_args", ("hf_train",)),
        ("actor_train.data_args.file_name=[]", "actor_train.data_args.file_name", ("one",)),
        ("actor_train.data_args.file_name=3", "actor_train.data_args.file_name", ("3",)),
        ("warm_start.slip_probability=1.0", "warm_start.slip_probability", ("1", "1.0")),
        ("actor_infer.generating_args.top_k=-2", "actor_infer.generating_args.top_k", ("-1", "-2")),
        ("kl_loss_type=k2", "kl_loss_type", ("kl", "abs", "mse", "k3", "k2")),
        ("kl_penalty=full", "kl_penalty", ("kl", "abs", "mse", "k3", "full")),
    ],
)
def test_wrong_value_is_shown_with_what_is_expected(override: str, key: str, values: tuple[str, ...]) -> None:
    problem = problem_of(override)
    assert problem.where.startswith("command line (")
    assert problem.key == key and problem.names(*values)


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        (
            "actor_train.strategy_args.strategy_name=vlm",
            "actor_train.strategy_args.strategy_name",
            ("megatron_train", "hf_train", "vlm"),
        ),
        (
            "actor_infer.strategy_args.strategy_name=vlm",
            "actor_infer.strategy_args.strategy_name",
            ("hf_infer", "vllm", "vlm"),
        ),
        ("~actor_train.strategy_args.strategy_name", "actor_train.strategy_args.strategy_name", ()),
    ],
)
def test_unknown_engine_is_refused(override: str, key: str, values: tuple[str, ...]) -> None:
    problem = problem_of(override)
    assert problem.key == key and problem.names(*values)


def test_missing_keys_are_named_with_the_block_they_belong_to() -> None:
    problems = problems_of("example_gspo", "~pretrain", "~rollout_batch_size", "~rewards", "~actor_train.data_args")
    assert [problem.key for problem in problems] == [
        *("actor_train.data_args", "pretrain", "rewards", "rollout_batch_size"),
    ]


@pytest.mark.parametrize(
    ("value", "devices"),
    [
        ("list(range(0,4))", (0, 1, 2, 3)),
        ("list(range(4))", (0, 1, 2, 3)),
        ("range(2, 4)", (2, 3)),
        ("[0, 1,2]", (0, 1, 2)),
        ([0, 3], (0, 3)),
        ("0-3", (0, 1, 2, 3)),
        ("0-1,4-5,7", (0, 1, 4, 5, 7)),
        ("6", (6,)),
        (None, None),
    ],
)
def test_device_mapping_forms(value: object, devices: tuple[int, ...] | None) -> None:
    assert parse_device_mapping(value) == devices


@pytest.mark.parametrize(
    "value",
    [
        "list(range(0,__import__('os').cpu_count()))",
        "__import__('pathlib').Path('evaluated').touch()",
        *(
            "",
            "[]",
            "a",
            "1,,2",
            "3-1",
            "0,0",
            "-1",
            "range(0)",
            "range(0,8,2)",
            "[0",
            "list(range(0,2))+[5]",
            "[[5]]",
        ),
        *([], [0, 0], [-1], [True], ["0"], 3, 1.5, {}, "0-99999999999", "list(range(0,80000000000))"),
    ],
)
def test_device_mapping_refuses_everything_else_and_evaluates_nothing(
    value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="device"):
        parse_device_mapping(value)
    assert not list(tmp_path.iterdir())


def test_group_choice_that_the_body_overrides_is_refused(tmp_path: Path) -> None:
    folder = derived_config(tmp_path, "importance_sampling: seq\ntrack_with: stdout\n")
    sampling, tracker = problems_of("mine", "importance_sampling=token", "tracker=none", config_dir=folder)
    assert sampling.where.endswith("mine.yaml:3") and sampling.key == "importance_sampling"
    assert sampling.names("token", "seq")
    assert tracker.where.endswith("mine.yaml:4") and tracker.key == "track_with" and tracker.names("tracker", "none")


def test_tracker_can_be_named_by_its_key_on_the_command_line() -> None:
    assert load_config("example_gspo", "track_with=none").config.track_with == ()
    assert load_config("example_gspo", "tracker=stdout").config.track_with == ("stdout",)


@pytest.mark.parametrize(
    ("overrides", "key", "values"),
    [
        (("use_pg_clip_range=false", "pg_clip_low=0.1"), "pg_clip_low", ("use_pg_clip_range", "true")),
        (
            ("reference.strategy_args.strategy_config.use_distributed_optimizer=true",),
            "reference.strategy_args.strategy_config.use_distributed_optimizer",
            ("megatron_train", "megatron_infer"),
        ),
        (
            ("gamma=0.9", "adv_estimator=rloo"),
            "gamma",
            ("adv_estimator", "reinforce_plus_plus", "gae"),
        ),
        (("pg_clip=0.1", "dual_clip_ratio=3"), "pg_clip", ("use_pg_clip_range", "false")),
        (("kl_loss_type=mse", "use_kl_loss=false", "kl_loss_coef=0"), "kl_loss_type", ("use_kl_loss", "true")),
        (("kl_penalty=k3",), "kl_penalty", ("add_token_level_kl", "true")),
        (("kl_horizon=5",), "kl_horizon", ("target_kl",)),
        (
            (
                "actor_train.training_args.lr_scheduler_type=constant",
                "actor_train.training_args.min_learning_rate=1e-5",
            ),
            "actor_train.training_args.min_learning_rate",
            ("lr_scheduler_type", "linear", "cosine"),
        ),
        (
            ("actor_train.training_args.warmup_ratio=0.1",),
            "actor_train.training_args.warmup_ratio",
            ("warmup_steps", "0"),
        ),
        (
            ("strategy=hf", "actor_train.strategy_args.strategy_config.generate_batch_size=8"),
            "actor_train.strategy_args.strategy_config.generate_batch_size",
            ("actor_infer",),
        ),
        (
            ("strategy=hf", "reference.strategy_args.strategy_config.generate_batch_size=8"),
            "reference.strategy_args.strategy_config.generate_batch_size",
            ("actor_infer",),
        ),
        (("dual_clip_loss=false", "dual_clip_ratio=3"), "dual_clip_ratio", ("dual_clip_loss", "true")),
        (("kl_loss_coef=0",), "use_kl_loss", ("true", "kl_loss_coef", "0")),
        (("use_kl_loss=false",), "kl_loss_coef", ("use_kl_loss", "true")),
        (("add_token_level_kl=true",), "add_token_level_kl", ("true", "init_kl_coef")),
        (("target_kl=0.1",), "target_kl", ("add_token_level_kl", "true")),
        (("reward_shift=true",), "reward_shift", ("true", "reward_norm")),
        (
            ("reward_norm=batch", "reward_shift=true", "reward_scale=true"),
            "reward_shift",
            ("true", "reward_scale", "false"),
        ),
        (("sequence_length=100",), "sequence_length", ("100", "prompt_length", "16")),
        (("~response_length",), "response_length", ("sequence_length",)),
        (("~response_length", "sequence_length=16"), "sequence_length", ("16", "prompt_length")),
        (("reference=null",), "use_kl_loss", ("true", "reference")),
        (("pretrain=Qwen/Qwen3-0.6B", "warm_start.steps=9"), "warm_start", ("Qwen/Qwen3-0.6B", "null")),
        (("actor_infer.generating_args.temperature=0",), "actor_infer.generating_args.temperature", ("0",)),
        (
            ("actor_infer.generating_args.max_new_tokens=9",),
            "actor_infer.generating_args.max_new_tokens",
            ("9", "response_length", "48"),
        ),
        (
            ("actor_infer.generating_args.num_return_sequences=2",),
            "actor_infer.generating_args.num_return_sequences",
            ("2", "num_return_sequences_in_group", "8"),
        ),
        (
            ("actor_train.training_args.min_learning_rate=1",),
            "actor_train.training_args.min_learning_rate",
            ("1", "learning_rate", "0.0002"),
        ),
        (
            ("actor_train.strategy_args.strategy_config.recompute_num_layers=1",),
            "actor_train.strategy_args.strategy_config.recompute_num_layers",
            ("recompute_granularity", "full"),
        ),
        (
            ("actor_train.strategy_args.strategy_config.tensor_model_parallel_size=3",),
            "actor_train.device_mapping",
            ("1", "3", "tensor_model_parallel_size"),
        ),
        (
            ("actor_train.training_args.gradient_accumulation_steps=3",),
            "rollout_batch_size",
            ("256", "96"),
        ),
        (("actor_train.device_mapping='0-2'",), "rollout_batch_size", ("256", "192")),
    ],
)
def test_rules_between_keys(overrides: tuple[str, ...], key: str, values: tuple[str, ...]) -> None:
    problem = problem_of(*overrides)
    assert problem.key == key and problem.names(*values)
    assert problem.where.startswith(("command line (", "conf/", "examples/")) or "missing" in problem.message


def test_groups_of_one_sample_refuse_both_group_baselines() -> None:
    problems = problems_of(
        "example_grpo", "num_return_sequences_in_group=1", "reward_norm=group", "model=tiny_qwen3_moe"
    )
    assert {"adv_estimator", "reward_norm"} <= {problem.key for problem in problems}


def test_broken_rules_of_several_blocks_are_reported_together() -> None:
    problems = problems_of(
        "example_gspo",
        *(
            "use_pg_clip_range=false",
            "pg_clip_low=0.1",
            "sequence_length=3",
            "reference=null",
            "pretrain=Qwen/Qwen3-0.6B",
            "warm_start.steps=9",
        ),
        *("kl_horizon=5", "actor_infer.generating_args.temperature=0"),
    )
    assert len(problems) == 6


def test_rule_is_located_at_the_key_given_on_the_command_line() -> None:
    problem = problem_of("actor_train.training_args.gradient_accumulation_steps=3")
    assert problem[:2] == (
        "command line (actor_train.training_args.gradient_accumulation_steps=3)",
        "rollout_batch_size",
    )


def test_rule_inside_a_block_is_located_at_its_line(tmp_path: Path) -> None:
    text = "actor_train:\n  strategy_args:\n    strategy_config:\n      recompute_method: block\n"
    problem = problem_of(name="mine", config_dir=derived_config(tmp_path, text))
    assert problem.where.endswith("mine.yaml:6")
    assert problem.key == "actor_train.strategy_args.strategy_config.recompute_method"


def test_interpolation_of_an_unknown_key_is_located(tmp_path: Path) -> None:
    problem = problem_of(name="mine", config_dir=derived_config(tmp_path, "exp_name: a\nrun_name: ${nope.x}\n"))
    assert problem.where.endswith("mine.yaml:4") and problem.key == "run_name" and problem.names("nope.x")


def test_environment_variable_that_is_not_set_is_named(tmp_path: Path) -> None:
    (problem,) = problems_of("mine", config_dir=derived_config(tmp_path, "run_name: ${oc.env:ROLL_GSPO_NOT_SET}\n"))
    assert problem.where.endswith("mine.yaml:3") and problem.key == "run_name" and problem.names("ROLL_GSPO_NOT_SET")


def test_values_left_open_are_all_named(tmp_path: Path) -> None:
    problems = problems_of("mine", config_dir=derived_config(tmp_path, "run_name: ???\nwarm_start:\n  seed: ???\n"))
    assert [problem.key for problem in problems] == ["run_name", "warm_start.seed"]
    assert problems[0].where.endswith("mine.yaml:3") and problems[1].where.endswith("mine.yaml:5")
    assert all("'???'" in problem.message for problem in problems)


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        ("pipeline=agentic", "pipeline", ("agentic",)),
        ("actor_infer.generating_args.num_beams=4", "actor_infer.generating_args.num_beams", ("4",)),
        ("actor_train.model_args.lora_target=all-linear", "actor_train.model_args.lora_target", ("LoRA", "all-linear")),
        ("max_ckpt_to_keep=3", "max_ckpt_to_keep", ("checkpoint_config.max_ckpt_to_keep", "3")),
        ("pg_variant=tis", "pg_variant", ("policy_loss",)),
        ("+actor_train.pg_variant=tis", "actor_train.pg_variant", ("policy_loss",)),
        ("error_max_len_clip=true", "error_max_len_clip", ("overlong_buffer_length",)),
        (
            "+train_infer_correction={filters:[{enabled:true}]}",
            "train_infer_correction.filters",
            ("lower_bound", "upper_bound"),
        ),
        ("+reference.router_replay={mode:R2}", "reference.router_replay", ("actor_train.router_replay",)),
        (
            "rewards.column_addition.judge_api_key=secret",
            "rewards.column_addition.judge_api_key",
            ("worker_args.api_key_env",),
        ),
        ("+rollout_mock={enable:true,mode:dump}", "rollout_mock", ()),
    ],
)
def test_features_of_later_versions_are_refused_by_name(override: str, key: str, values: tuple[str, ...]) -> None:
    problem = problem_of(override)
    assert problem.message.startswith("not supported yet: ")
    assert problem.key == key and problem.names(*values)


def test_secrets_are_not_printed_with_the_problem() -> None:
    assert "secret" not in problem_of("rewards.column_addition.judge_api_key=secret").message


@pytest.mark.parametrize(
    "override",
    [
        *("async_generation_ratio=0", "rl_loss_coef=1.0", "max_len_mask=false", "generate_opt_level=1"),
        *("pg_variant=ppo", "+rollout_mock={enable:false,mode:dump}", "+query_filter_config={type:no_filter}"),
        *("+train_infer_correction={is_weight:{enabled:false,upper_bound:1.2},filters:[{enabled:false}]}",),
        *("+actor_train.router_replay={mode:disable}", "actor_train.apply_loss_scale=true", "+tag_to_template={}"),
        *("+actor_train.data_args.domain_interleave_probs={column_addition:1.0}", "critic=null"),
    ],
)
def test_features_of_later_versions_may_be_written_when_off(override: str) -> None:
    assert load_config("example_gspo", override).warnings == ()


def test_ignored_keys_of_roll_give_one_warning_a_reason_with_their_lines(tmp_path: Path) -> None:
    text = "base_dir: x\nactor_train:\n  model_args: {flash_attn: fa2}\nrpc_timeout: 1\n"
    first, second = sorted(load_config("mine", config_dir=derived_config(tmp_path, text)).warnings)
    assert "base_dir (" in first and "mine.yaml:3)" in first and "mine.yaml:5)" in first
    assert first.endswith(": ROLL never reads it")
    assert second.startswith("ignored, delete it: rpc_timeout (") and "worker_timeout_s decides" in second


def test_environment_variables_are_not_taken_for_keys_of_roll() -> None:
    loaded = load_config("example_gspo", "+system_envs={name: a, world_size: b, max_concurrency: c}")
    assert loaded.config.system_envs == {"name": "a", "world_size": "b", "max_concurrency": "c"}
    assert loaded.warnings == ()


def test_tables_of_roll_keys_do_not_shadow_keys_of_the_schema() -> None:
    for path in {*IGNORED, *NOT_SUPPORTED_YET}:
        block, _, key = path.replace("rewards.*", "rewards.domain").rpartition(".")
        blocks = list(ROLES) if block.startswith("*") else [block]
        for role in blocks:
            location = tuple((role + block[1:] if block.startswith("*") else block).split("."))
            assert key not in known_keys(location if location != ("",) else ()), path
    assert not set(IGNORED) & set(NOT_SUPPORTED_YET)


def test_configuration_is_frozen() -> None:
    config = load_config("example_gspo").config
    for block, key in ((config, "max_steps"), (config.actor_train.training_args, "learning_rate")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(block, key, 1)


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path, text: str) -> None:
    folder = derived_config(tmp_path, f"actor_train:\n  training_args:\n    learning_rate: {text}\n")
    assert load_config("mine", config_dir=folder).config.actor_train.training_args.learning_rate == 0.001


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mathrule", "math_rule"),
        (
            "roll.pipeline.rlvr.rewards.general_val_rule_reward_worker.GeneralValRuleRewardWorker",
            "GeneralValRuleRewardWorker",
        ),
    ],
)
def test_reward_workers_that_do_not_exist_are_refused_before_anything_is_built(name: str, value: str) -> None:
    problem = problem_of(f"rewards.column_addition.worker_cls={name}")
    assert problem.key == "rewards.column_addition.worker_cls" and problem.names(value)


def test_rolls_math_worker_stands_for_math_rule() -> None:
    worker = "roll.pipeline.rlvr.rewards.math_rule_reward_worker.MathRuleRewardWorker"
    config = load_config("example_gspo", f"rewards.column_addition.worker_cls={worker}").config
    assert config.rewards["column_addition"].worker_cls == "math_rule"


def test_flat_yaml_of_roll_is_understood_as_it_is() -> None:
    loaded = load_config("roll_example_gspo", config_dir=HERE)
    config = loaded.config
    assert (config.importance_sampling, config.clip_range, config.max_response_length) == ("seq", (3e-4, 4e-4), 4096)
    assert config.actor_train.device_mapping == tuple(range(16)) and config.data_parallel_size == 16
    assert config.actor_infer.generating_args.num_return_sequences == 8
    assert config.rewards["math_rule"].worker_cls == "math_rule"
    assert config.checkpoint_config.output_dir == "/data/checkpoints/rlvr_gspo"
    warned = " ".join(loaded.warnings)
    for key in ("value_clip", "actor_train.model_args.flash_attn", "rewards.math_rule.model_args"):
        assert f"{key} (" in warned
    assert "lambd" not in warned, "it has the value that it would have anyway"
    assert config.critic is not None and not config.needs_critic
    assert "critic       not built: adv_estimator is reinforce, not gae" in make_plan(config).text()


def test_flat_yaml_takes_a_group_option_with_a_plus() -> None:
    config = load_config("roll_example_gspo", "+importance_sampling=token", config_dir=HERE).config
    assert (config.importance_sampling, config.clip_range) == ("token", (0.2, 0.27))


def test_flat_yaml_of_roll_that_asks_for_too_much_names_all_of_it() -> None:
    problems = problems_of("roll_example_refused", config_dir=HERE)
    assert [problem.key for problem in problems] == [
        *("adv_estimator", "max_ckpt_to_keep", "pg_variant", "norm_mean_type"),
        *("norm_std_type", "tracker_kwargs.api_key", "token_level_loss", "train_infer_correction.is_weight"),
        *(
            "actor_train.worker_cls",
            "actor_train.data_args.template",
            "actor_train.data_args.domain_interleave_probs.code_sandbox",
        ),
        *("actor_train.strategy_args.strategy_name", "actor_train.device_mapping"),
        *("rewards.llm_judge.judge_model_type", "rewards.llm_judge.judge_api_key"),
    ]
    assert all("roll_example_refused.yaml:" in problem.where for problem in problems)
