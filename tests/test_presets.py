"""Presets: each is the choice on the axes that its paper makes, and any axis beside it wins."""

from __future__ import annotations

from typing import Any

import pytest
from composed import load_config

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.pipelines.plan import make_plan
from roll_gspo.run import shipped_folders

EXAMPLES, GROUPS = shipped_folders()
PRESETS = sorted(file.stem for file in (GROUPS / "algorithm").glob("*.yaml"))
EXAMPLE_OF = {name: f"example_{name}" for name in PRESETS} | {
    "reinforce_plus_plus": "example_reinforce_pp",
    "raft_plus_plus": "example_raft_pp",
}
SEQ_RANGE, TOKEN_RANGE = (3e-4, 4e-4), (0.2, 0.27)
DOCUMENTED: dict[str, tuple[Any, ...]] = {
    "gspo": ("reinforce", "seq", "clip", SEQ_RANGE, "seq-mean-token-sum"),
    "gspo_paper": ("grpo", "seq", "clip", SEQ_RANGE, "seq-mean-token-mean"),
    "gspo_token": ("grpo", "seq_token", "clip", SEQ_RANGE, "seq-mean-token-mean"),
    "grpo": ("grpo", "token", "clip", TOKEN_RANGE, "seq-mean-token-mean"),
    "dr_grpo": ("dr_grpo", "token", "clip", (0.2, 0.2), "seq-mean-token-sum-norm"),
    "dapo": ("grpo", "token", "clip", (0.2, 0.28), "token-mean"),
    "ppo": ("gae", "token", "clip", (0.2, 0.2), "token-mean"),
    "rloo": ("rloo", "token", "clip", TOKEN_RANGE, "seq-mean-token-sum"),
    "reinforce_plus_plus": ("reinforce_plus_plus", "token", "clip", (0.2, 0.2), "token-mean"),
    "raft_plus_plus": ("raft_plus_plus", "token", "clip", (0.2, 0.2), "seq-mean-token-mean"),
    "topr": ("dr_grpo", "token", "topr", None, "seq-mean-token-sum"),
    "cispo": ("grpo", "token", "cispo", (1.0, 4.0), "token-mean"),
    "gmpo": ("grpo", "token", "gmpo", (0.3297, 0.4918), "seq-mean-token-mean"),
    "sapo": ("grpo", "token", "sapo", None, "seq-mean-token-mean"),
    "luspo": ("grpo", "seq", "clip", (2e-3, 2.5e-3), "seq-mean-token-sum"),
    "fspo": ("grpo", "token", "fspo", (0.03, 0.03), "seq-mean-token-mean"),
    "vespo": ("grpo", "token", "vespo", None, "token-mean"),
    "dppo": ("grpo", "token", "dppo", None, "token-mean"),
    "maxrl": ("maxrl", "token", "clip", TOKEN_RANGE, "token-mean"),
    "gdpo": ("gdpo", "token", "clip", TOKEN_RANGE, "seq-mean-token-mean"),
}
WITH_KL_LOSS, WITH_TOKEN_LEVEL_KL = {"gspo", "grpo", "ppo"}, {"reinforce_plus_plus"}


def axes_of(config: ExperimentConfig) -> tuple[Any, ...]:
    """The choices that `DOCUMENTED` lists."""
    names = ("adv_estimator", "importance_sampling", "policy_loss", "loss_agg_mode")
    estimator, level, loss, aggregation = (config.model_dump()[name] for name in names)
    return estimator, level, loss, config.clip_range, aggregation


def test_every_preset_is_documented_and_has_an_example() -> None:
    assert set(DOCUMENTED) == set(PRESETS)
    examples = {file.stem for file in EXAMPLES.glob("example_*.yaml")}
    other_tasks = {"example_sft", "example_multi_domain", "example_agentic_gspo", "example_tool_use"}
    assert set(EXAMPLE_OF.values()) == examples - other_tasks


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_has_the_axes_of_its_paper(preset: str) -> None:
    config = load_config("base", f"algorithm={preset}").config
    assert axes_of(config) == DOCUMENTED[preset]
    assert config.use_kl_loss == (preset in WITH_KL_LOSS)
    assert config.add_token_level_kl == (preset in WITH_TOKEN_LEVEL_KL)
    assert config.needs_critic == (preset == "ppo")
    assert config.filters_groups == (preset == "dapo")
    assert (config.overlong_buffer_length is not None) == (preset == "dapo")


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_its_source(preset: str) -> None:
    comment = "".join(
        line for line in (GROUPS / "algorithm" / f"{preset}.yaml").read_text().splitlines() if line.startswith("#")
    )
    assert "arXiv" in comment


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_on_the_command_line_is_its_example(preset: str) -> None:
    example = load_config(EXAMPLE_OF[preset]).config
    for name in ("example_gspo", "example_dapo", "base"):
        switched = load_config(name, f"algorithm={preset}").config
        assert switched.model_dump(exclude={"exp_name"}) == example.model_dump(exclude={"exp_name"})
    assert example.exp_name == EXAMPLE_OF[preset] and example.seed == 42


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_warned_of_only_if_it_weights_by_length_or_needs_several_rewards(preset: str) -> None:
    plan = make_plan(load_config(EXAMPLE_OF[preset]).config)
    expected = {"gspo": ["loss_agg_mode"], "luspo": ["loss_agg_mode"], "gdpo": ["adv_estimator"]}.get(preset, [])
    assert [warning.key for warning in plan.warnings] == expected
    assert plan.not_runnable == ()


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_leaves_sizes_alone_and_makes_several_updates_a_rollout(preset: str) -> None:
    gspo, config = (load_config(EXAMPLE_OF[name]).config for name in ("gspo", preset))
    for key in ("actor_train", "actor_infer", "rollout_batch_size", "num_return_sequences_in_group", "max_steps"):
        assert config.model_dump()[key] == gspo.model_dump()[key]
    assert config.updates_per_rollout == 4, "as in the GSPO paper, section 5.1"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("strategy", ["megatron", "hf"])
@pytest.mark.parametrize("model", ["tiny_qwen3", "tiny_qwen3_moe"])
def test_preset_works_on_every_embedded_model_and_engine(preset: str, strategy: str, model: str) -> None:
    config = load_config(EXAMPLE_OF[preset], f"strategy={strategy}", f"model={model}").config
    assert make_plan(config).not_runnable == ()
    if config.critic is not None:
        assert config.critic.strategy_args.strategy_name == f"{strategy}_train"
        assert config.critic.training_args.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("preset", "axis", "clip_range"),
    [
        ("dapo", "importance_sampling=seq", SEQ_RANGE),
        ("ppo", "importance_sampling=segment", SEQ_RANGE),
        ("gspo", "importance_sampling=token", TOKEN_RANGE),
        ("dapo", "policy_loss=cispo", (1.0, 4.0)),
        ("dapo", "policy_loss=sapo", None),
        ("grpo", "policy_loss=topr", None),
        ("gmpo", "policy_loss=clip", TOKEN_RANGE),
    ],
)
def test_axis_beside_a_preset_wins_and_brings_its_clip_range(
    preset: str, axis: str, clip_range: tuple[float, float] | None
) -> None:
    loaded = load_config("example_gspo", f"algorithm={preset}", axis)
    assert loaded.warnings == () and loaded.config.clip_range == clip_range
    key, _, option = axis.partition("=")
    assert loaded.config.model_dump()[key] == option


def test_dual_clip_goes_with_the_clip() -> None:
    assert load_config("example_gspo").config.effective_dual_clip_ratio == 1.4
    assert load_config("example_gspo", "importance_sampling=token").config.effective_dual_clip_ratio == 1.4
    assert load_config("example_gspo", "policy_loss=sapo").config.effective_dual_clip_ratio is None


def test_overlong_buffer_of_dapo_is_a_fifth_of_the_models_response() -> None:
    for model in (file.stem for file in (GROUPS / "model").glob("*.yaml")):
        config = load_config("example_dapo", f"model={model}").config
        assert config.overlong_buffer_length is not None
        assert config.overlong_buffer_length / config.max_response_length == pytest.approx(0.2, abs=0.01)


def test_bounds_of_gmpo_are_powers_of_e() -> None:
    low, high = load_config("example_gmpo").config.clip_range or (0, 0)
    assert (1 - low, 1 + high) == pytest.approx((2.718281828**-0.4, 2.718281828**0.4), abs=1e-4)
