"""`pipeline: sft`: what it takes of the shared groups, what it refuses, and the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from composed import load_config
from config_problems import problem_of

from roll_gspo.config.sft import SftConfig
from roll_gspo.pipelines.plan import make_plan


def sft(*overrides: str) -> SftConfig:
    config = load_config("example_sft", *overrides).config
    assert isinstance(config, SftConfig)
    return config


def test_groups_bring_their_part_without_a_word() -> None:
    loaded = load_config("example_sft", "strategy=hf", "model=tiny_qwen3_moe", "data=gsm8k")
    assert loaded.warnings == () and isinstance(loaded.config, SftConfig)
    assert loaded.config.actor_train.strategy_args.strategy_name == "hf_train"
    assert loaded.config.pretrain == "builtin:tiny_qwen3_moe" and loaded.config.warm_start is None
    assert set(loaded.config.model_dump()).isdisjoint({"rewards", "actor_infer", "rollout_batch_size"})


def test_benchmark_brings_its_held_out_rows() -> None:
    config = sft("validation=gsm8k")
    assert config.validation is not None and config.validation.data_args.file_name[0].endswith("test.jsonl")
    assert sft("validation=null").validation is None


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        ("actor_infer.device_mapping=[0]", "actor_infer", ("rlvr", "sft")),
        ("rewards.x={worker_cls: exact_match}", "rewards", ("rlvr", "sft")),
        ("response_length=5", "response_length", ("rlvr", "sft")),
        ("+kl=loss", "kl", ("loss", "sft")),
        ("actor_train.router_replay.mode=R2", "actor_train.router_replay", ("sft",)),
        ("validation.generating_args.top_k=1", "validation.generating_args", ("rlvr", "sft")),
        ("weight_transfer.checksum=true", "weight_transfer", ("sft",)),
        ("max_worker_restarts=1", "max_worker_restarts", ("sft",)),
        ("num_epochs=null", "num_epochs", ("max_steps",)),
        ("num_epoch=2", "num_epoch", ("num_epochs",)),
        ("actor_train.data_args.multi_turn=both", "actor_train.data_args.multi_turn", ("joint", "separate", "both")),
        ("actor_train.model_args.dtype=fp16", "actor_train.model_args.dtype", ("fp16", "bf16", "fp32")),
        ("pretrain=some/model warm_start.steps=5", "warm_start", ("some/model", "null")),
        ("actor_train.data_args.domain=x", "actor_train.data_args.domain", ("rlvr", "sft")),
        ("actor_train.data_args.ground_truth=x", "actor_train.data_args.ground_truth", ("rlvr", "sft")),
        (
            "actor_train.data_args.domain_interleave_probs={x: 1}",
            "actor_train.data_args.domain_interleave_probs",
            ("rlvr", "sft"),
        ),
        ("trace_groups=2", "trace_groups", ("rlvr", "sft")),
        ("actor_train.data_args.template=plain", "actor_train.data_args.template", ("plain", "sft")),
        ("global_template=plain", "global_template", ("sft",)),
        ("tag_to_template={x: plain}", "tag_to_template.x", ("sft",)),
        (
            "checkpoint_config.keep_best=validation/score_mean",
            "checkpoint_config.keep_best",
            ("validation/score_mean", "validation/loss", "validation/perplexity"),
        ),
        (
            "checkpoint_config.keep_best=validation/loss",
            "checkpoint_config.keep_best_mode",
            ("max", "validation/loss", "min"),
        ),
        ("response_key=out", "response_key", ("not", "supported")),
    ],
)
def test_key_without_effect_is_refused(override: str, key: str, values: tuple[str, ...]) -> None:
    problem = problem_of(*override.split(" ") if "=some" in override else [override], name="example_sft")
    assert problem.key == key and problem.names(*values)


def test_each_device_without_parallelism_holds_a_copy() -> None:
    assert sft("actor_train.device_mapping=[0,1,2]").data_parallel_size == 3


def test_best_checkpoint_needs_a_validation() -> None:
    keep = ("checkpoint_config.keep_best=validation/loss", "checkpoint_config.keep_best_mode=min")
    problem = problem_of(*keep, "validation=null", name="example_sft")
    assert problem.key == "checkpoint_config.keep_best" and problem.names("validation")
    assert "and at the best validation/loss" in make_plan(sft(*keep)).text()


def test_sequences_beyond_the_context_cannot_run() -> None:
    (problem,) = make_plan(sft("sequence_length=100000")).not_runnable
    assert problem.key == "sequence_length" and "100000" in problem.message


def test_ranks_hold_whole_copies() -> None:
    sizes = "actor_train.strategy_args.strategy_config.tensor_model_parallel_size=2"
    problem = problem_of(sizes, "actor_train.device_mapping=[0,1,2]", name="example_sft")
    assert problem.key == "actor_train.device_mapping" and problem.names("3", "2 or 4")


def test_users_file_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [example_sft, _self_]\nnum_epochs: 3\nrollout_batch_size: 4\n")
    problem = problem_of(name="mine", config_dir=tmp_path)
    assert problem.where.endswith("mine.yaml:3") and problem.key == "rollout_batch_size"
    assert problem.names("rlvr", "sft")


def test_keys_of_sft_are_refused_elsewhere() -> None:
    problem = problem_of("num_epochs=2")
    assert problem.key == "num_epochs" and problem.names("rlvr", "sft")


@pytest.mark.parametrize(
    ("overrides", "num_samples", "num_steps"),
    [
        (("num_epochs=4",), 4096, 512),
        (("num_epochs=1",), 33, 2),
        (("num_epochs=1", "max_steps=7"), 4096, 7),
        (("num_epochs=1", "max_steps=700"), 64, 2),
        (("num_epochs=null", "max_steps=7"), 3, 7),
    ],
)
def test_steps_of_a_run(overrides: tuple[str, ...], num_samples: int, num_steps: int) -> None:
    assert sft(*overrides).num_steps(num_samples) == num_steps


def test_plan_says_what_a_step_is() -> None:
    text = make_plan(sft("strategy=hf", "max_steps=9", "num_epochs=2", "resume_from_checkpoint=true")).text()
    for line in (
        "roles       actor_train  hf_train        this machine",
        "data        builtin:column_addition; sequences ≤ 1024 tokens",
        "updates     a step is one optimizer step: mini-batches of 32 (1 micro-batch(es) of 32 × DP 1)",
        "loss        negative log-likelihood, mean over the tokens of all assistant's turns of a sequence",
        "run         9 steps or 2 pass(es) over the data, whichever is over first, checkpoint every 128, validation "
        "before, every 64 and after, seed 42, resume: True",
    ):
        assert line in text
    assert "rewards" not in text and "warning" not in text
    assert "DP 2" in make_plan(sft("model=qwen3_30b_a3b")).text()
    assert make_plan(sft("layout=two_ranks")).not_runnable == ()
