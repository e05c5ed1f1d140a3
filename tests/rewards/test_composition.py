"""Compositions of rewards: evaluation, worker processes, and the schema of the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from roll_gspo.config.rewards import RewardConfig
from roll_gspo.errors import ConfigError, RewardError
from roll_gspo.rewards import RewardOutput, RewardPool, RewardRequest
from roll_gspo.rewards.composition import Composition, Part
from roll_gspo.rewards.from_config import spec_from_config

USER_MODULE = """
from roll_gspo.rewards import RewardOutput

def length(prompt, response, ground_truth, unit=1, **row):
    return len(response) * unit + row.get("bonus", 0)

def fails(prompt, response, ground_truth):
    raise ValueError("no idea")

def is_polite(prompt, response, ground_truth):
    return RewardOutput(0.5, "forty-two", {"style": 0.25})
"""
REQUEST = RewardRequest("p", "so: 42", "42", {"bonus": 1, "prompt": "column with a reserved name"})


@pytest.fixture(autouse=True)
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write a module with rewards of a user."""
    (tmp_path / "my_parts.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    yield


def constant(value: Any) -> Callable[[RewardRequest], Any]:
    """Return a reward with a constant output."""
    return lambda request: value


def exits(request: RewardRequest) -> float:
    """Exit the process."""
    raise SystemExit(3)


def never_called(request: RewardRequest) -> float:
    """Fail the test if the reward is evaluated."""
    raise AssertionError("this part must not be evaluated")


def test_weighted_sum_adds_weight_times_score() -> None:
    parts = {"a": Part(constant(1), 0.8), "b": Part(constant(0.5), 0.2), "c": Part(constant(2.0), -1.0)}
    output = Composition("weighted_sum", parts)(REQUEST)
    assert output == RewardOutput(pytest.approx(0.8 + 0.1 - 2.0), None, {"a": 1, "b": 0.5, "c": 2})


def test_min_is_the_lowest_score() -> None:
    parts = {"a": Part(constant(1)), "b": Part(constant(-0.5)), "c": Part(constant(0))}
    assert Composition("min", parts)(REQUEST) == RewardOutput(-0.5, None, {"a": 1, "b": -0.5, "c": 0})


@pytest.mark.parametrize(("score", "threshold"), [(1.0, 1.0), (0.5, 0.5), (3, 1.0)])
def test_passed_gate_returns_the_weighted_sum_of_the_other_parts(score: float, threshold: float) -> None:
    parts = {"gate": Part(constant(score), threshold=threshold), "a": Part(constant(2), 0.5), "b": Part(constant(3))}
    output = Composition("gate", parts, else_score=-7)(REQUEST)
    assert output == RewardOutput(4.0, None, {"gate": score, "a": 2, "b": 3})


def test_failed_gate_skips_the_other_parts() -> None:
    parts = {"gate": Part(constant(RewardOutput(0.99, "x", {"why": 1}))), "costly": Part(never_called)}
    assert Composition("gate", parts, -1.0)(REQUEST) == RewardOutput(-1.0, "x", {"gate": 0.99, "gate/why": 1})


def test_answer_is_that_of_the_first_part_with_one() -> None:
    parts = {
        "a": Part(constant(1)),
        "b": Part(constant(RewardOutput(1, "b"))),
        "c": Part(constant(RewardOutput(1, "c"))),
    }
    assert Composition("weighted_sum", parts)(REQUEST).answer == "b"


@pytest.mark.parametrize("value", [math.nan, math.inf, "text", None, RewardOutput(1, None, {"x": math.nan})])
def test_part_without_a_finite_number_raises_with_its_name(value: Any) -> None:
    with pytest.raises(RewardError, match=r"^part 'b': "):
        Composition("min", {"a": Part(constant(0)), "b": Part(constant(value))})(REQUEST)


def test_exception_of_a_part_raises_with_its_name() -> None:
    with pytest.raises(RewardError, match="part 'b': SystemExit: 3"):
        Composition("min", {"a": Part(constant(0)), "b": Part(exits)})(REQUEST)


def block(**keys: Any) -> RewardConfig:
    """Return the validated block."""
    return RewardConfig.model_validate(keys)


def part(name: str, **keys: Any) -> dict[str, Any]:
    """Return the keys of one part."""
    return {"worker_cls": name, **keys}


def test_pool_builds_all_parts_in_one_process() -> None:
    composition = block(
        combine="weighted_sum",
        parts={
            "exact": part("exact_match", worker_args={"delimiter": ":"}),
            "length": part("my_parts.length", worker_args={"unit": 2}, weight=-0.1),
            "style": part("my_parts:is_polite", weight=2.0),
        },
    )
    with RewardPool(spec_from_config(composition, "rewards.x"), 1, 30.0, "rewards.x") as pool:
        (result,) = pool.score([REQUEST])
        assert len(pool.pids) == 1
    assert result.failed is None and result.answer == "42"
    assert result.score == pytest.approx(1 - 0.1 * 13 + 2 * 0.5)
    assert result.components == {"exact": 1, "length": 13, "style": 0.5, "style/style": 0.25}


def test_failing_part_fails_only_its_sample() -> None:
    failing = block(
        combine="gate",
        parts={"exact": part("exact_match"), "bad": part("my_parts.fails")},
    )
    with RewardPool(spec_from_config(failing, "rewards.x"), 1, 30.0, "rewards.x") as pool:
        failed, gated = pool.score([REQUEST, RewardRequest("p", "so: 41", "42")])
        (pid,) = pool.pids
        assert pool.score([REQUEST])[0] == failed and pool.pids == [pid]
    assert failed.failed == "RewardError: part 'bad': ValueError: no idea"
    assert (gated.failed, gated.score, gated.components) == (None, 0.0, {"exact": 0.0})


def test_unknown_argument_of_a_part_fails_check() -> None:
    wrong = block(combine="min", parts={"a": part("exact_match", worker_args={"delim": ""}), "b": part("math_rule")})
    with (
        RewardPool(spec_from_config(wrong, "rewards.x"), 1, 30.0, "rewards.x") as pool,
        pytest.raises(ConfigError, match=r"^rewards\.x: reward exact_match: .*'delim'"),
    ):
        pool.check()


TWO = {"a": part("exact_match"), "b": part("math_rule")}


@pytest.mark.parametrize(
    ("keys", "problem_key", "value"),
    [
        ({}, "worker_cls", "missing"),
        ({"worker_cls": "exact_match", "combine": "min", "parts": TWO}, "parts", "exact_match"),
        ({"worker_cls": "exact_match", "combine": "min"}, "combine", "min"),
        ({"parts": TWO}, "combine", "missing"),
        ({"combine": "min", "parts": {"a": TWO["a"]}}, "parts", "'a'"),
        ({"combine": "min", "parts": TWO, "worker_args": {"x": 1}}, "worker_args", "worker_cls"),
        ({"combine": "min", "parts": TWO, "else_score": 1.0}, "else_score", "combine: gate"),
        ({"combine": "min", "parts": {**TWO, "c": part("math_rule", weight=2.0)}}, "parts.c.weight", "combine: min"),
        ({"combine": "gate", "parts": {"g": part("math_rule", weight=2.0), **TWO}}, "parts.g.weight", "combine: gate"),
        (
            {"combine": "gate", "parts": {**TWO, "c": part("math_rule", threshold=2.0)}},
            "parts.c.threshold",
            "combine: gate",
        ),
        (
            {"combine": "weighted_sum", "parts": {**TWO, "c": part("math_rule", threshold=2.0)}},
            "parts.c.threshold",
            "combine: gate",
        ),
        ({"combine": "weighted_sum", "parts": {**TWO, "c/d": part("math_rule")}}, "parts", "'c/d'"),
        ({"worker_cls": "exact_match", "judge_prompt": "x"}, "judge_prompt", "worker_cls: llm_judge"),
        ({"worker_cls": "llm_judge", "worker_args": {"deadline_s": 600}}, "worker_args.deadline_s", "timeout_s 330"),
        (
            {
                "combine": "min",
                "timeout_s": 60,
                "parts": {**TWO, "c": part("llm_judge", worker_args={"deadline_s": 60})},
            },
            "parts.c.worker_args.deadline_s",
            "timeout_s 60",
        ),
        ({"worker_cls": "llm_judge", "judge_model_type": "inference"}, "judge_model_type", "judge_model_name"),
        (
            {"worker_cls": "llm_judge", "judge_model_name": "m", "worker_args": {"model": "n"}},
            "worker_args.model",
            "judge_*",
        ),
    ],
)
def test_broken_rule_of_a_block_has_its_key(keys: dict[str, Any], problem_key: str, value: str) -> None:
    with pytest.raises(ValidationError) as caught:
        block(**keys)
    (error,) = caught.value.errors()
    (problem,) = error["ctx"]["error"].problems
    assert problem.key == problem_key and value in problem.message


@pytest.mark.parametrize(
    ("wrong", "location"),
    [(part("mathrule"), ("parts", "c", "worker_cls")), ({**TWO["a"], "parts": TWO}, ("parts", "c", "parts"))],
)
def test_wrong_part_is_located(wrong: dict[str, Any], location: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        block(combine="min", parts={**TWO, "c": wrong})
    assert [error["loc"] for error in caught.value.errors()] == [location]


def test_judge_keys_become_arguments() -> None:
    worker = "roll.pipeline.rlvr.rewards.llm_judge_reward_worker.LLMJudgeRewardWorker"
    api = block(worker_cls=worker, judge_model_type="api", judge_model_name="m", judge_api_url="u", judge_prompt="p")
    assert (api.worker_cls, api.arguments) == ("llm_judge", {"model": "m", "base_url": "u", "prompt": "p"})
    served = block(
        worker_cls=worker, judge_model_type="inference", judge_model_name="m", worker_args={"parser": "yes_no"}
    )
    assert served.arguments == {"engine": {"model": "m"}, "parser": "yes_no"}


def test_rewards_with_models_have_longer_default_timeouts() -> None:
    judge, model = part("llm_judge"), part("reward_model")
    assert block(**judge).timeout_s == 330.0 and block(**model).timeout_s == 120.0
    assert block(combine="min", parts={"j": judge, "m": model}).timeout_s == 330.0
    assert block(**judge, timeout_s=5.0).timeout_s == 5.0 and block(worker_cls="math_rule").timeout_s == 10.0
