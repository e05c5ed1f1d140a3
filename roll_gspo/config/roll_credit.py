"""Estimators of steps and `reward_normalization` of ROLL's agentic files, by the keys of this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Report = Callable[[str, str], None]

OF_STEPS = ("gigpo", "step_reinforce")
DEFAULTS = {"step_reward_gamma": 0.95, "episode_reward_weight": 1.0, "step_reward_weight": 1.0}
METHODS = {"identity": (False, False), "mean": (True, False), "mean_std": (True, True), "asym_clip": (True, True)}


def with_credit(values: dict[str, Any], report: Report) -> dict[str, Any]:
    """Convert the keys of an agentic file; what has no counterpart stays and is refused."""
    if "train_env_manager" not in values:
        return values
    is_normalised = "reward_normalization" in values
    values = _with_norm(values, report)
    if "reward_normalization" in values:
        return values
    estimator, norm = values.get("adv_estimator"), values.get("reward_norm")
    if estimator in OF_STEPS:
        return _of_steps(values, str(estimator), norm, report)
    if estimator == "grpo" and norm != "group" and is_normalised:
        values["adv_estimator"] = "reinforce"
        report("adv_estimator", "reinforce is used: ROLL's agentic grpo normalises as reward_normalization says only")
    return values


def _of_steps(values: dict[str, Any], estimator: str, norm: Any, report: Report) -> dict[str, Any]:
    """Convert an estimator of steps; `gigpo` only if it compares the episodes of a group, as its paper does."""
    if estimator == "gigpo" and norm != "group":
        return values
    given = {key: values.get(key, default) for key, default in DEFAULTS.items()}
    if estimator == "gigpo":
        credit = {"adv_estimator": "grpo", "turn_baseline": "state", **given}
    else:
        credit = {"adv_estimator": "reinforce", "step_reward_gamma": given["step_reward_gamma"]}
        credit |= {"turn_baseline": "group"} if norm == "group" else {}
        values = {key: value for key, value in values.items() if key not in DEFAULTS}
    found = {"credit": "turn", **credit}
    report("adv_estimator", f"{estimator} is {', '.join(f'{key}: {value}' for key, value in found.items())}")
    return values | found


def _with_norm(values: dict[str, Any], report: Report) -> dict[str, Any]:
    """Replace `reward_normalization` by `reward_norm` and its switches, if these can say the same."""
    block = values.get("reward_normalization")
    if not isinstance(block, Mapping) or set(block) - {"grouping", "method", "norm_mean_type", "norm_std_type"}:
        return dict(values)
    grouping, method = block.get("grouping", "batch"), block.get("method", "identity")
    manager = values["train_env_manager"]
    tags = manager.get("tags") if isinstance(manager, Mapping) else None
    if grouping == "tags" and isinstance(tags, list) and len(tags) == 1:
        grouping = "batch"
    norm = {"batch": "batch", "traj_group_id": "group"}.get(grouping)
    if norm is None or method not in METHODS:
        return dict(values)
    subtracts, divides = METHODS[method]
    mean = block.get("norm_mean_type") or (norm if subtracts else None)
    std = block.get("norm_std_type") or (norm if divides else None)
    if {mean, std} - {None, norm}:  # mean and deviation of different samples
        return dict(values)
    found = {"reward_norm": norm if mean or std else None, "reward_shift": std is None and mean is not None}
    found["reward_scale"] = mean is None and std is not None
    text = ", ".join(f"{key}: {'null' if value is None else str(value).lower()}" for key, value in found.items())
    report("reward_normalization", f"is {text}")
    return {key: value for key, value in values.items() if key != "reward_normalization"} | found
