"""Roles that share devices: what the plan says, and which configurations it refuses."""

from __future__ import annotations

import pytest
from composed import load_config
from config_problems import parse_problem

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.strategy import StrategyArgs
from roll_gspo.pipelines import plan
from roll_gspo.pipelines.sharing import (
    offloaded_roles,
    sharing_problems,
    sharing_roles,
    sharing_texts,
    sharing_warnings,
)

RAY = "execution=ray"
APART = (RAY, "actor_infer.device_mapping=[1]", "reference.device_mapping=[2]")
TOGETHER = {"actor_train": (0,), "actor_infer": (0,), "reference": (0,)}


def config_of(*overrides: str) -> ExperimentConfig:
    """The embedded example with overrides."""
    return load_config("example_gspo", *overrides).config


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        ((), TOGETHER),
        ((RAY,), TOGETHER),
        (APART, {}),
        (("kl=none",), dict.fromkeys(("actor_train", "actor_infer"), (0,))),
        (("algorithm=ppo", "kl=none"), dict.fromkeys(("actor_train", "actor_infer", "critic"), (0,))),
        (
            (
                RAY,
                "actor_train.device_mapping='0-3'",
                "reference.device_mapping='0-3'",
                "actor_infer.device_mapping=[4]",
            ),
            {"actor_train": (0, 1, 2, 3), "reference": (0, 1, 2, 3)},
        ),
        (("layout=two_ranks",), {"actor_train": (0, 1), "actor_infer": (0, 1), "reference": (0,)}),
    ],
)
def test_roles_that_share_a_device(overrides: tuple[str, ...], shared: dict[str, tuple[int, ...]]) -> None:
    assert sharing_roles(config_of(*overrides)) == shared


def test_roles_take_turns_on_gpus_unless_the_key_says_otherwise() -> None:
    for switch, on_cuda, expected in (
        *(("null", True, TOGETHER), ("null", False, {}), ("null", None, {})),
        *(("false", True, {}), ("true", False, TOGETHER), ("true", None, TOGETHER)),
    ):
        assert offloaded_roles(config_of(f"offload_states={switch}"), on_cuda) == expected, (switch, on_cuda)
    assert offloaded_roles(load_config("example_sft").config, True) == {}, "one role shares with nobody"


def test_the_plan_names_the_roles_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(sharing_texts(config_of(), False)) == []
    (text,) = sharing_texts(config_of(), True)
    assert text == "actor_train, actor_infer, reference take turns on device(s) 0 (offload_states)"
    monkeypatch.setattr(plan, "finds_cuda", lambda config: True)
    assert ("roles", text) in plan.make_plan(config_of()).rows
    assert plan.make_plan(config_of()).not_runnable == ()


@pytest.mark.parametrize(
    ("overrides", "on_cuda", "key", "values"),
    [
        (("offload_states=true",), False, "offload_states", ("actor_infer", "device(s) 0", "no sleep mode on a CPU")),
        (
            ("async_generation_ratio=1",),
            True,
            "async_generation_ratio",
            ("1", "actor_infer", "actor_train", "device(s) 0", "set 0", "offload_states: false"),
        ),
        (
            ("async_generation_ratio=1", RAY),
            True,
            "async_generation_ratio",
            ("actor_infer.device_mapping, e.g. 1", "offload_states: false"),
        ),
    ],
)
def test_what_cannot_take_turns_is_refused(
    overrides: tuple[str, ...], on_cuda: bool, key: str, values: tuple[str, ...]
) -> None:
    (problem,) = (parse_problem(str(problem)) for problem in sharing_problems(config_of(*overrides), on_cuda))
    assert problem.key == key and problem.names(*values)


def test_an_engine_that_cannot_leave_is_refused_on_shared_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("strategy=hf")
    assert list(sharing_problems(config, True)) == []
    monkeypatch.setattr(type(config.reference.strategy_args), "offload_problem", StrategyArgs.offload_problem)  # type: ignore[union-attr]
    found = {problem.key: problem.message for problem in sharing_problems(config, True)}
    assert set(found) == {f"{role}.strategy_args.strategy_name" for role in ("actor_infer", "reference")}
    assert "hf_infer does not implement OffloadableEngine" in found["reference.strategy_args.strategy_name"]
    assert list(sharing_problems(config_of("strategy=hf", "offload_states=false"), True)) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("offload_states=true", "strategy=hf"),
        ("async_generation_ratio=1", "offload_states=false"),
        (*APART, "async_generation_ratio=1"),
        (RAY, "actor_infer.device_mapping=[1]", "async_generation_ratio=1"),  # trainer and reference take turns
    ],
)
def test_what_can_run_is_accepted(overrides: tuple[str, ...]) -> None:
    assert list(sharing_problems(config_of(*overrides), True)) == []


def test_a_switch_without_effect_and_crowded_devices_are_warned_about() -> None:
    (problem,) = sharing_warnings(config_of(*APART, "offload_states=true"), None)
    assert problem.key == "offload_states" and "no role shares a device" in problem.message
    (problem,) = sharing_warnings(config_of("offload_states=false"), True)
    assert problem.key == "offload_states" and "actor_train, actor_infer, reference" in problem.message
    assert list(sharing_warnings(config_of("offload_states=false"), False)) == []
