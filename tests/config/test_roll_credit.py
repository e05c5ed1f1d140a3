"""Advantages of turns in ROLL's agentic files."""

from __future__ import annotations

from typing import Any

import pytest

from roll_gspo.config.roll_credit import with_credit

OFF = {"reward_norm": None, "reward_shift": False, "reward_scale": False}


def converted(**values: Any) -> tuple[dict[str, Any], list[str]]:
    reported: list[str] = []
    found = with_credit({"train_env_manager": {"tags": ["Sokoban"]}, **values}, lambda key, _: reported.append(key))
    del found["train_env_manager"]
    return found, reported


def normalisation(grouping: str, method: str, **others: str) -> dict[str, Any]:
    return {"reward_normalization": {"grouping": grouping, "method": method, **others}}


def test_gigpo_compares_turns_of_one_state() -> None:
    found, reported = converted(adv_estimator="gigpo", step_reward_weight=0.5, **normalisation("traj_group_id", "mean"))
    assert found == {
        **{"adv_estimator": "grpo", "credit": "turn", "turn_baseline": "state"},
        **{"step_reward_gamma": 0.95, "episode_reward_weight": 1.0, "step_reward_weight": 0.5},
        **{"reward_norm": "group", "reward_shift": True, "reward_scale": False},
    }
    assert reported == ["reward_normalization", "adv_estimator"]


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [("batch", {"reward_norm": "batch"}), ("traj_group_id", {"reward_norm": "group", "turn_baseline": "group"})],
)
def test_step_reinforce_is_reinforce_of_turns(grouping: str, expected: dict[str, str]) -> None:
    found, _ = converted(
        adv_estimator="step_reinforce", episode_reward_weight=1.0, **normalisation(grouping, "mean_std")
    )
    credit = {"adv_estimator": "reinforce", "credit": "turn", "step_reward_gamma": 0.95}
    assert found == {**credit, "reward_shift": False, "reward_scale": False, **expected}


def test_grpo_of_agentic_files_normalises_only_as_they_say() -> None:
    assert converted(adv_estimator="grpo", **normalisation("batch", "identity"))[0] == {
        "adv_estimator": "reinforce",
        **OFF,
    }
    found, _ = converted(adv_estimator="grpo", **normalisation("tags", "mean_std"))
    assert (found["adv_estimator"], found["reward_norm"]) == ("reinforce", "batch"), "of the only environment"
    found, _ = converted(adv_estimator="grpo", **normalisation("traj_group_id", "mean_std"))
    assert found == {"adv_estimator": "grpo", "reward_norm": "group", "reward_shift": False, "reward_scale": False}


@pytest.mark.parametrize(
    "block",
    [
        normalisation("state", "mean"),
        normalisation("traj_group_id", "mean_std", norm_std_type="batch"),
        normalisation("batch", "rank"),
    ],
)
def test_what_has_no_counterpart_stays_and_is_refused(block: dict[str, Any]) -> None:
    found, reported = converted(adv_estimator="gigpo", **block)
    assert found == {"adv_estimator": "gigpo", **block} and not reported


def test_other_files_are_left_alone() -> None:
    values = {"adv_estimator": "grpo", "step_reward_gamma": 0.5}
    assert with_credit(values, lambda *_: pytest.fail("nothing differs")) is values
    assert converted(**values) == (values, []), "an episode's rewards may be discounted"
