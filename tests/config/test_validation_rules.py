"""The block `validation` and what belongs to it: rules, lengths, and its config group beside every example."""

from __future__ import annotations

import pytest
from composed import load_config
from config_problems import problem_of

from roll_gspo.pipelines.plan import make_plan

GREEDY = "validation.generating_args.temperature=0"
EIGHT = "validation.generating_args.num_return_sequences=8"


@pytest.mark.parametrize(
    ("overrides", "key", "values"),
    [
        (
            ("validation.metrics_k=[4]",),
            "validation.metrics_k",
            ("pass@4", "generating_args.num_return_sequences", "1"),
        ),
        ((EIGHT, "validation.metrics_k=[2,2]"), "validation.metrics_k", ("[2, 2]",)),
        ((EIGHT, "validation.metrics_k=[0]"), "validation.metrics_k.0", ("0",)),
        ((EIGHT, GREEDY), "validation.generating_args.temperature", ("0", "8", "generating_args.num_return_sequences")),
        (("val_prompt_length=64", "val_sequence_length=64"), "val_sequence_length", ("64", "val_prompt_length")),
        (
            ("val_sequence_length=40", "validation.generating_args.max_new_tokens=8"),
            "val_sequence_length",
            ("40", "16", "validation.generating_args.max_new_tokens"),
        ),
        (("validation=null", "val_prompt_length=64"), "val_prompt_length", ("64", "validation")),
        (
            ("validation=null", "checkpoint_config.keep_best=validation/score_mean"),
            "checkpoint_config.keep_best",
            ("validation/score_mean", "validation"),
        ),
        (
            ("checkpoint_config.keep_best=rollout/score_mean",),
            "checkpoint_config.keep_best",
            ("rollout/score_mean", "validation", "validation/score_mean"),
        ),
        (("checkpoint_config.keep_best_mode=min",), "checkpoint_config.keep_best_mode", ("keep_best",)),
    ],
)
def test_rules_of_validation(overrides: tuple[str, ...], key: str, values: tuple[str, ...]) -> None:
    problem = problem_of(*overrides)
    assert problem.key == key and problem.names(*values)


def test_attempts_follow_from_the_number_of_samples() -> None:
    for overrides, attempts in (((), ()), ((EIGHT,), (8,)), ((EIGHT, "validation.metrics_k=[8,1]"), (1, 8))):
        block = load_config("example_gspo", *overrides).config.validation
        assert block is not None and block.attempts == attempts


def test_engine_holds_what_validation_needs() -> None:
    plain = load_config("example_gspo").config
    assert plain.engine_sequence_length == plain.max_sequence_length == 64
    for overrides in (
        ("val_prompt_length=100", "val_sequence_length=150"),
        ("val_prompt_length=100", "validation.generating_args.max_new_tokens=50"),
    ):
        config = load_config("example_gspo", *overrides).config
        assert (config.validation_prompt_length, config.validation_response_length) == (100, 50)
        assert config.engine_sequence_length == 150 and config.max_response_length == 48


def test_lengths_beyond_the_models_context_cannot_run() -> None:
    (problem,) = make_plan(load_config("example_gspo", "val_prompt_length=4090").config).not_runnable
    assert problem.key == "val_sequence_length"
    assert all(number in problem.message for number in ("4090", "48", "4138", "builtin:tiny_qwen3 has 4096"))
    (problem,) = make_plan(load_config("example_gspo", "response_length=4096").config).not_runnable
    assert problem.key == "response_length" and "4112" in problem.message


@pytest.mark.parametrize("data", ["column_addition", "gsm8k"])
@pytest.mark.parametrize("option", ["math_benchmarks", "aime", "gsm8k", "math"])
def test_benchmarks_bring_their_rewards_and_room_for_their_prompts(data: str, option: str) -> None:
    config = load_config("example_gspo", f"data={data}", f"validation={option}").config
    assert config.validation is not None and config.validation.data_args.num_rows is None
    assert config.validation_prompt_length == 2048
    judged_by = {"math_benchmarks": {"math_rule"}, "aime": {"math_rule"}, "gsm8k": {"gsm8k"}}
    assert judged_by.get(option, {"math_rule", "gsm8k"}) <= set(config.rewards)
