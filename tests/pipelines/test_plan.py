"""The plan: its arithmetic, its warnings, and the settings that cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from composed import load_config

from roll_gspo.models.size import size_of
from roll_gspo.models.tiny import TINY_MODELS, build_model
from roll_gspo.pipelines.memory import GIB
from roll_gspo.pipelines.plan import Plan, make_plan


def plan_of(name: str, *overrides: str) -> Plan:
    """The plan of a shipped example with overrides."""
    loaded = load_config(name, *overrides)
    return make_plan(loaded.config, loaded.warnings)


def row(plan: Plan, label: str) -> str:
    """The text of every row of this label."""
    return "\n".join(text for name, text in plan.rows if name == label)


def warned_keys(name: str, *overrides: str) -> list[str]:
    """The keys that the plan warns about."""
    return [warning.key for warning in plan_of(name, *overrides).warnings]


def test_example_gspo_warns_about_length_weighting_only() -> None:
    plan = plan_of("example_gspo")
    assert [warning.key for warning in plan.warnings] == ["loss_agg_mode"]
    assert plan.not_runnable == ()


def test_example_grpo_and_the_papers_gspo_have_no_warning() -> None:
    assert warned_keys("example_grpo") == []
    assert warned_keys("example_gspo", "loss_agg_mode=seq-mean-token-mean") == []


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("level", ["seq", "seq_token", "segment"])
def test_sequence_ratio_with_length_weighting_gives_a_warning(level: str, mode: str) -> None:
    (warning,) = plan_of("example_gspo", f"importance_sampling={level}", f"loss_agg_mode={mode}").warnings
    assert warning.key == "loss_agg_mode" and warning.message.startswith(f"{mode} ")


def test_token_ratio_may_have_any_aggregation() -> None:
    assert warned_keys("example_grpo", "loss_agg_mode=token-mean") == []


@pytest.mark.parametrize("overrides", [("pg_clip_high=0.27",), ("use_pg_clip_range=false",)])
def test_token_scale_clip_with_a_sequence_ratio_gives_a_warning(overrides: tuple[str, ...]) -> None:
    (warning,) = plan_of("example_gspo", "loss_agg_mode=seq-mean-token-mean", *overrides).warnings
    assert warning.key == "importance_sampling" and "3e-4/4e-4" in warning.message


def test_sequence_scale_clip_with_a_token_ratio_gives_a_warning() -> None:
    (warning,) = plan_of("example_grpo", "pg_clip_low=3e-4", "pg_clip_high=4e-4").warnings
    assert warning.key == "importance_sampling"
    assert "(0.0003, 0.0004)" in warning.message and "0.2/0.27" in warning.message


def test_group_option_switches_the_clip_range_with_the_level() -> None:
    plan = plan_of("example_gspo", "adv_estimator=grpo", "importance_sampling=token")
    assert row(plan, "ratio").startswith(
        "token, clip 0.2/0.27 (to [0.8, 1.27]; importance_sampling: token), dual clip 1.4 (1 + 2 * pg_clip), "
        "seq-mean-token-sum, grpo"
    )
    assert row(plan_of("example_gspo"), "ratio").startswith(
        "seq, clip 0.0003/0.0004 (to [0.9997, 1.0004]; importance_sampling: seq)"
    )


@pytest.mark.parametrize(
    ("overrides", "origin"),
    [
        (("pg_clip_low=0.1",), "pg_clip_low, pg_clip_high"),
        (("use_pg_clip_range=false",), "pg_clip"),
        (("importance_sampling=seq",), "importance_sampling: seq"),
        (("policy_loss=cispo",), "policy_loss: cispo"),
        ((), "pg_clip_ranges.token"),
    ],
)
def test_plan_has_the_origin_of_the_clip_range(overrides: tuple[str, ...], origin: str) -> None:
    assert f"; {origin})" in row(plan_of("example_dapo", *overrides), "ratio")


def test_plan_has_the_other_defaults_that_depend_on_a_combination() -> None:
    text = plan_of("example_dapo", "data=multi_domain", "adv_estimator=gae").text()
    assert "responses over 51 tokens" in text and "overlong_buffer_length 13" in text
    assert "warm start of 520 steps on builtin:multi_domain" in text
    assert "critic       learning rate 0.001" in text


@pytest.mark.parametrize("old_log_probs", ["recompute", "rollout"])
def test_one_update_per_rollout_gives_a_warning(old_log_probs: str) -> None:
    key = "actor_train.training_args.gradient_accumulation_steps"
    overrides = (f"{key}=8", f"old_log_probs={old_log_probs}")
    (warning,) = plan_of("example_grpo", *overrides).warnings
    assert warning.key == key and warning.message.startswith("8 ")
    assert ("enable_old_logprobs_recompute" in warning.message) == (old_log_probs == "rollout")
    assert warned_keys("example_grpo", *overrides, "ppo_epochs=2") == []
    assert warned_keys("example_grpo", f"old_log_probs={old_log_probs}") == []


@pytest.mark.parametrize("reader", ["train_infer_correction=token_truncate", "enable_old_logprobs_recompute=false"])
@pytest.mark.parametrize(("key", "value"), [("top_p", 0.9), ("top_k", 20)])
def test_truncated_sampling_gives_a_warning_if_the_engines_log_probs_are_read(
    key: str, value: float, reader: str
) -> None:
    sampling = f"actor_infer.generating_args.{key}={value}"
    (warning,) = plan_of("example_grpo", reader, sampling).warnings
    assert warning.key == f"actor_infer.generating_args.{key}" and warning.message.startswith(f"{value} ")
    assert reader.partition("=")[0] in warning.message
    assert warned_keys("example_grpo", reader) == [] == warned_keys("example_grpo", sampling)


@pytest.mark.parametrize(("norm", "samples"), [("group", "a prompt"), ("batch", "a rollout"), ("running", "the run")])
def test_division_by_a_deviation_of_zero_gives_a_warning(norm: str, samples: str) -> None:
    overrides = (f"reward_norm={norm}", "reward_scale=true")
    (warning,) = plan_of("example_gspo_paper", *overrides).warnings
    assert warning.key == "reward_scale" and f"reward_norm: {norm}" in warning.message and samples in warning.message
    assert warned_keys("example_gspo_paper", *overrides, "reward_clip=10") == []
    assert warned_keys("example_gspo_paper", f"reward_norm={norm}") == []


def test_dr_grpo_after_division_by_the_groups_deviation_gives_a_warning() -> None:
    (warning,) = plan_of("example_dr_grpo", "reward_norm=group").warnings
    assert warning.key == "adv_estimator" and "reward_norm: group" in warning.message
    assert warned_keys("example_dr_grpo", "reward_norm=group", "reward_shift=true") == []
    assert warned_keys("example_dr_grpo", "reward_norm=batch") == []


@pytest.mark.parametrize(
    ("example", "selected"),
    [("example_raft_pp", "adv_estimator: raft_plus_plus"), ("example_topr", "policy_loss: topr")],
)
def test_whitening_gives_a_warning_if_the_sign_of_the_advantage_matters(example: str, selected: str) -> None:
    (warning,) = plan_of(example, "whiten_advantages=true").warnings
    assert warning.key == "whiten_advantages" and selected in warning.message


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_whitening_twice_gives_no_warning(estimator: str) -> None:
    assert warned_keys("example_grpo", f"adv_estimator={estimator}", "whiten_advantages=true") == []


@pytest.mark.parametrize(
    ("overrides", "mini_batch", "per_rollout"),
    [
        ((), 64, 4),
        (("ppo_epochs=3",), 64, 12),
        (("actor_train.training_args.per_device_train_batch_size=1",), 2, 128),
        (("actor_train.device_mapping=[0,1]",), 128, 2),
        (("rollout_batch_size=8", "num_return_sequences_in_group=16"), 64, 2),
    ],
)
def test_optimizer_steps_are_counted(overrides: tuple[str, ...], mini_batch: int, per_rollout: int) -> None:
    text = row(plan_of("example_gspo", "max_steps=60", *overrides), "updates")
    assert f"mini-batches of {mini_batch} (" in text
    assert text.endswith(f"{per_rollout} optimizer steps per rollout, {60 * per_rollout} in all")


def test_unused_reference_is_not_built() -> None:
    plan = plan_of("example_gspo", "use_kl_loss=false", "kl_loss_coef=0")
    assert "reference    not built: no KL term is switched on" in row(plan, "roles")
    assert "reference: none" in row(plan, "log-probs")
    assert "reference: megatron_infer" in row(plan_of("example_gspo"), "log-probs")


def test_row_of_log_probs_names_the_engine_that_computes_them() -> None:
    text = row(plan_of("example_gspo", "enable_old_logprobs_recompute=false"), "log-probs")
    assert text.startswith("old: those of vllm")


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_size_of_a_builtin_model_is_that_of_the_real_one(name: str) -> None:
    size = size_of(f"builtin:{name}")
    model = build_model(TINY_MODELS[name], seed=0)
    assert size is not None
    assert size.num_parameters == sum(p.numel() for p in model.parameters())
    assert size.num_expert_parameters == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)


def test_size_of_a_checkpoint_is_read_from_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(TINY_MODELS["tiny_qwen3"].hf_config)))
    size = size_of(str(tmp_path))
    assert size is not None and size.source == "config.json"
    assert size.num_parameters == size_of("builtin:tiny_qwen3").num_parameters  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "total", "experts"),
    [("some/Model-7B", 7e9, 0), ("some/Model-0.6B-Chat", 6e8, 0), ("some/Model-30B-A3B-Base", 30e9, 28.5e9)],
)
def test_size_of_a_name_is_read_from_it(name: str, total: float, experts: float) -> None:
    size = size_of(name)
    assert size is not None
    assert (size.num_parameters, size.num_expert_parameters, size.source) == (total, experts, "from its name")


def test_unknown_size_is_reported() -> None:
    plan = plan_of("example_gspo", "pretrain=some/model", "warm_start=null")
    assert "size unknown until it is read" in row(plan, "model")
    assert row(plan, "memory").startswith("unknown")
    assert size_of("builtin:none") is None


def memory_gib(plan: Plan) -> float:
    """The number of GiB in the memory row."""
    return float(row(plan, "memory").removeprefix("about ").partition(" ")[0])


def test_memory_of_a_float32_model_counts_each_copy() -> None:
    size = size_of("builtin:tiny_qwen3")
    assert size is not None
    trained = 4 + 4 + 8  # parameter, gradient, two moments
    with_reference = size.num_parameters * (trained + 4 + 4) / GIB
    assert memory_gib(plan_of("example_gspo")) == pytest.approx(with_reference, rel=0.01)
    without = plan_of("example_gspo", "use_kl_loss=false", "kl_loss_coef=0")
    assert memory_gib(without) == pytest.approx(size.num_parameters * (trained + 4) / GIB, rel=0.01)


def test_memory_of_a_shared_device_adds_up() -> None:
    alone = memory_gib(plan_of("example_gspo"))
    apart = ("execution=ray", "actor_infer.device_mapping=[1]", "reference.device_mapping=[2]")
    assert memory_gib(plan_of("example_gspo", "execution=ray")) == pytest.approx(alone)
    assert memory_gib(plan_of("example_gspo", *apart)) == pytest.approx(alone * 16 / 24, rel=0.01)


def test_text_has_every_row_warning_and_problem() -> None:
    plan = plan_of("qwen2.5_7b_gspo", "execution=local")
    text = plan.text()
    for part in (*(text for _, text in plan.rows), *plan.warnings, *plan.not_runnable):
        assert str(part) in text
    assert "cannot run  actor_train.device_mapping: 8 devices " in text
    assert text.splitlines()[0].endswith("plan of qwen2.5_7b_gspo")


def test_row_of_updates_has_the_token_budget() -> None:
    plan = plan_of("example_gspo", "actor_train.max_tokens_per_microbatch_in_train=512")
    assert "mini-batches of 64 (64 in micro-batches of up to 512 tokens × DP 1)" in row(plan, "updates")
    assert "4 optimizer steps per rollout, 320 in all" in row(plan, "updates")


def test_devices_that_are_not_contiguous_are_listed() -> None:
    text = row(plan_of("example_gspo", "actor_infer.device_mapping=[0,2]"), "roles")
    assert "devices 0,2, TP 1 · 2 engine(s)" in text


def test_critic_has_a_row_if_it_is_built() -> None:
    plan = plan_of("example_ppo", "critic_warmup=5")
    assert "critic       megatron_train  this machine, TP 1" in row(plan, "roles")
    assert row(plan, "updates").endswith("4 optimizer steps per rollout, 300 in all"), "75 of 80 rollouts"
    assert "80 steps (5 of the critic alone)" in row(plan, "run")
    assert "critic" not in row(plan_of("example_gspo"), "roles")


def test_memory_counts_the_critic() -> None:
    size = size_of("builtin:tiny_qwen3")
    assert size is not None
    expected = size.num_parameters * (2 * (4 + 4 + 8) + 4 + 4) / GIB
    assert memory_gib(plan_of("example_ppo")) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("example", "text"),
    [
        ("example_cispo", "token, cispo 1/4 (to [0, 5]; policy_loss: cispo), token-mean, grpo"),
        (
            "example_gmpo",
            "token, gmpo 0.3297/0.4918 (to [0.6703, 1.4918]; policy_loss: gmpo), seq-mean-token-mean, grpo",
        ),
        ("example_sapo", "token, sapo (sapo_tau_positive 1, sapo_tau_negative 1.05), seq-mean-token-mean, grpo"),
        (
            "example_fspo",
            "token, fspo 0.03/0.03 (to [exp(-0.03 √n), exp(0.03 √n)]; policy_loss: fspo), seq-mean-token-mean, grpo",
        ),
        ("example_topr", "token, topr, seq-mean-token-sum, dr_grpo"),
        ("example_dapo", "token, clip 0.2/0.28 (to [0.8, 1.28]; pg_clip_ranges.token), no dual clip, token-mean, grpo"),
    ],
)
def test_row_of_the_ratio_has_the_bounds_of_the_objective(example: str, text: str) -> None:
    assert row(plan_of(example), "ratio") == text


@pytest.mark.parametrize(
    ("overrides", "label", "text"),
    [
        (("query_filter=std_filter",), "samples", "groups whose scores deviate by more than 0 stay"),
        (("query_filter=mean_filter", "max_sampling_rounds=3"), "samples", "between 0.1 and 0.9 stay, others are"),
        (
            ("query_filter=mean_filter", "max_sampling_rounds=3"),
            "samples",
            "; at most 3 × rollout_batch_size prompts per",
        ),
        (("overlong_buffer_length=8",), "samples", "responses over 40 tokens lose up to 1 of their score"),
        (("max_len_mask=true",), "samples", "not in the loss: responses cut at the limit"),
        (("difficulty_mask=true",), "samples", "not in the loss: groups with a mean score outside (0, 1)"),
        (("off_policy_mask=opsm",), "samples", "not in the policy loss: negative advantages with a KL per token above"),
        (("token_mask=top_entropy",), "samples", "in the policy loss: the fraction 0.2 of tokens"),
        (
            ("importance_sampling=seq", "pg_clip_length_scaling=true"),
            "ratio",
            "clip (pg_clip_length_scaling True) 0.03/0.03 (to [exp(-0.03/√n), exp(0.03/√n)]; pg_clip_length_scaling)",
        ),
        (("length_loss_weight=true",), "samples", "weighted by length"),
        (("difficulty_loss_weight=true",), "samples", "weighted by the difficulty of the data row"),
        (("train_infer_correction=token_truncate",), "log-probs", "clamped to [0, 2]"),
        (
            ("train_infer_correction=geometric_mask",),
            "log-probs",
            "geometric weights of trainer over engine, 0 outside",
        ),
        (("router_replay=R2", "model=tiny_qwen3_moe"), "log-probs", "chosen by the pass that recomputed the old"),
        (("router_replay=R3", "model=tiny_qwen3_moe"), "log-probs", "chosen by the pass that sampled"),
        (("router_replay=record", "model=tiny_qwen3_moe"), "log-probs", "none is replayed"),
    ],
)
def test_switched_on_feature_has_a_row(overrides: tuple[str, ...], label: str, text: str) -> None:
    plan = plan_of("example_grpo", *overrides)
    assert text in row(plan, label)
    assert text not in plan_of("example_grpo").text()
    assert plan.not_runnable == ()


@pytest.mark.parametrize("option", ["record", "R2", "R3"])
def test_routing_replay_of_a_model_without_experts_cannot_run(option: str) -> None:
    (problem,) = plan_of("example_gspo", f"router_replay={option}").not_runnable
    assert problem.key == "actor_train.router_replay" and "builtin:tiny_qwen3" in problem.message
    assert plan_of("qwen3_30b_a3b_gspo", "layout=single", f"router_replay={option}").not_runnable == ()
