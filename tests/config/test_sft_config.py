"""`pipeline: sft`: what it takes of the shared groups, what it refuses, and the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from composed import load_config

from roll_gspo.config.sft import SftConfig
from roll_gspo.errors import ConfigError
from roll_gspo.pipelines.plan import make_plan


def sft(*overrides: str) -> SftConfig:
    config = load_config("example_sft", *overrides).config
    assert isinstance(config, SftConfig)
    return config


def refusal(*overrides: str, name: str = "example_sft", config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name, *overrides, config_dir=config_dir)
    return str(caught.value)


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
    ("override", "text"),
    [
        ("actor_infer.device_mapping=[0]", "actor_infer: acts with pipeline: rlvr only, this is sft; remove it"),
        ("rewards.x={worker_cls: exact_match}", "rewards: acts with pipeline: rlvr only"),
        ("response_length=5", "response_length: acts with pipeline: rlvr only"),
        ("+kl=loss", "kl=loss: says nothing that pipeline: sft reads; leave this choice out"),
        ("actor_train.router_replay.mode=R2", "actor_train: router_replay replays the experts of a rollout"),
        ("validation.generating_args.top_k=1", "validation.generating_args: acts with pipeline: rlvr only"),
        ("weight_transfer.checksum=true", "weight_transfer acts with generation engines"),
        ("max_worker_restarts=1", "max_worker_restarts acts with generation engines"),
        ("num_epochs=null", "num_epochs: missing; add it, or max_steps"),
        ("actor_train.device_mapping=[0,1,2]", ""),
        ("num_epoch=2", "unknown key; did you mean 'num_epochs'?"),
        ("actor_train.data_args.multi_turn=both", "expected one of joint, separate, got 'both'"),
        ("actor_train.model_args.dtype=fp16", "actor_train.model_args.dtype: fp16 is not supported yet"),
        ("pretrain=some/model warm_start.steps=5", "warm_start makes a builtin: model ready"),
        ("actor_train.data_args.domain=x", "actor_train.data_args.domain: acts with pipeline: rlvr only"),
        ("actor_train.data_args.ground_truth=x", "ground_truth: acts with pipeline: rlvr only"),
        ("actor_train.data_args.domain_interleave_probs={x: 1}", "domain_interleave_probs: acts with pipeline: rlvr"),
        ("trace_groups=2", "trace_groups: acts with pipeline: rlvr only"),
        ("actor_train.data_args.template=plain", "actor_train.data_args.template: plain marks neither turns nor"),
        ("global_template=plain", "global_template: plain marks neither"),
        ("tag_to_template={x: plain}", "tag_to_template.x: plain marks neither"),
        ("checkpoint_config.keep_best=validation/score_mean", "choose one of validation/loss, validation/perplexity"),
        ("checkpoint_config.keep_best=validation/loss", "keep_best_mode: max would keep the worst validation/loss"),
        ("response_key=out", "not supported yet: other names of columns"),
    ],
)
def test_key_without_effect_is_refused(override: str, text: str) -> None:
    if not text:
        assert sft(override).data_parallel_size == 3
        return
    assert text in refusal(*override.split(" ") if "=some" in override else [override])


def test_best_checkpoint_needs_a_validation() -> None:
    keep = ("checkpoint_config.keep_best=validation/loss", "checkpoint_config.keep_best_mode=min")
    assert "needs the validation block" in refusal(*keep, "validation=null")
    assert "and at the best validation/loss" in make_plan(sft(*keep)).text()


def test_sequences_beyond_the_context_cannot_run() -> None:
    (problem,) = make_plan(sft("sequence_length=100000")).not_runnable
    assert problem.startswith("sequence_length: 100000 tokens, but the context of builtin:")


def test_ranks_hold_whole_copies() -> None:
    sizes = "actor_train.strategy_args.strategy_config.tensor_model_parallel_size=2"
    assert "name 2 or 4 devices" in refusal(sizes, "actor_train.device_mapping=[0,1,2]")


def test_users_file_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [example_sft, _self_]\nnum_epochs: 3\nrollout_batch_size: 4\n")
    text = refusal(name="mine", config_dir=tmp_path)
    assert text.endswith("mine.yaml:3: rollout_batch_size: acts with pipeline: rlvr only, this is sft; remove it")


def test_keys_of_sft_are_refused_elsewhere() -> None:
    text = refusal("num_epochs=2", name="example_gspo")
    assert text.endswith("num_epochs: acts with pipeline: sft only, this is rlvr; remove it")


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
        "data        builtin:column_addition (the first 4096); sequences ≤ 1024 tokens",
        "updates     a step is one optimizer step: mini-batches of 32 (1 micro-batch(es) of 32 × DP 1)",
        "loss        negative log-likelihood, mean over the tokens of all assistant's turns of a sequence",
        "run         9 steps or 2 pass(es) over the data, whichever is over first, checkpoint every 128, validation "
        "before, every 64 and after, seed 42, resume: True",
    ):
        assert line in text
    assert "rewards" not in text and "warning" not in text
    assert "DP 2" in make_plan(sft("model=qwen3_30b_a3b")).text()
    assert make_plan(sft("layout=two_ranks")).not_runnable == ()
