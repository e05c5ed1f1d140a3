"""Values of ROLL's files that this project reads in another way. The plan lists each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from roll_gspo.config.base import parse_device_mapping
from roll_gspo.config.reward_table import shipped_name
from roll_gspo.config.roll_credit import with_credit
from roll_gspo.config.strategy import ROLL_ENGINE_KEYS, ROLL_ENGINES, ROLL_OPTIONS

Report = Callable[[str, str], None]

ROLES = ("actor_train", "actor_infer", "reference", "critic")
FREE_TEXT = ("exp_name", "run_name", "system_envs", "tracker_kwargs")
ROLL_JUDGE_PROMPTS = ("Qwen2.5-7B-Instruct-RLVR-prompt",)


def convert(values: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return composed YAML with ROLL's values converted, and (key path, difference) pairs."""
    found: list[tuple[str, str]] = []

    def report(path: str, difference: str) -> None:
        found.append((path, difference))

    values = {k: v if k in FREE_TEXT else _without_none_text(v, k, report) for k, v in values.items()}
    if values.get("rl_loss_coef") == 0 and isinstance(values["rl_loss_coef"], int | float):
        del values["rl_loss_coef"]
        report("rl_loss_coef", "0 would switch the policy loss off; here its weight is 1 (TOPR is policy_loss: topr)")
        if values.get("adv_estimator") == "gae" and values.get("critic") is None:
            values["adv_estimator"] = "reinforce"
            report("adv_estimator", "gae needs a critic, and there is none; reinforce is used")
    values = with_credit(values, report)
    for role in ROLES:
        if isinstance(values.get(role), dict):
            values[role] = _with_engine(values[role], role, report)
    if isinstance(rewards := values.get("rewards"), dict):
        values["rewards"] = {name: _with_judge(block, f"rewards.{name}", report) for name, block in rewards.items()}
    return values, found


def _without_none_text(value: Any, path: str, report: Report) -> Any:
    """Replace the text `None`, Python's null, by null."""
    if value == "None":
        report(path, "'None' is read as null")
        return None
    if isinstance(value, dict):
        return {k: v if k == "worker_args" else _without_none_text(v, f"{path}.{k}", report) for k, v in value.items()}
    return value


def _with_engine(block: dict[str, Any], role: str, report: Report) -> dict[str, Any]:
    """Replace an engine of ROLL that does not exist here, and an omitted `strategy_config`."""
    args = block.get("strategy_args")
    if not isinstance(args, dict):
        return block
    name, config = args.get("strategy_name"), args.get("strategy_config")
    if isinstance(name, str) and name in ROLL_ENGINES:
        engine, defaults = ROLL_ENGINES[name]
        given = config.items() if isinstance(config, dict) else ()
        renamed = {ROLL_ENGINE_KEYS[key]: value for key, value in given if key in ROLL_ENGINE_KEYS}
        args = args | {"strategy_name": engine, "strategy_config": defaults | renamed}
        report(
            f"{role}.strategy_args.strategy_name", f"{engine} runs instead of {name}; its strategy_config is ignored"
        )
    elif "strategy_config" in args and config is None:
        args = {key: value for key, value in args.items() if key != "strategy_config"}
    elif isinstance(config, dict) and isinstance(name, str):
        path = f"{role}.strategy_args.strategy_config"
        args = args | {"strategy_config": _with_options(config, ROLL_OPTIONS.get(name, {}), path, report)}
    return block | {"strategy_args": args}


def _with_options(config: dict[str, Any], table: Mapping[str, Any], path: str, report: Report) -> dict[str, Any]:
    """Replace options of an engine that ROLL names differently."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        match table.get(key):
            case None:
                found[key] = value
            case str(decides):
                report(f"{path}.{key}", f"ignored: {decides}")
            case (new_key, values):
                found[new_key] = value if values is None else values.get(str(value), value)
                report(f"{path}.{key}", f"is {new_key}: {str(found[new_key]).lower()} here")
    return found


def _with_judge(block: Any, path: str, report: Report) -> Any:
    """Convert a judge whose model and devices are written as those of a role."""
    if not isinstance(block, dict) or shipped_name(str(block.get("worker_cls"))) != "llm_judge":
        return block
    if block.get("judge_prompt") in ROLL_JUDGE_PROMPTS:
        report(f"{path}.judge_prompt", f"the default prompt is used instead of ROLL's '{block['judge_prompt']}'")
        block = block | {"judge_prompt": None}
    model_args, arguments = block.get("model_args"), block.get("worker_args") or {}
    model = model_args.get("model_name_or_path") if isinstance(model_args, dict) else None
    named = block.get("judge_model_name") is not None or "engine" in arguments
    if block.get("judge_model_type") != "inference" or named or model is None:
        return block
    engine = {"model": model}
    try:
        devices = parse_device_mapping(block.get("device_mapping"))
    except ValueError:
        devices = None
    if devices is not None:
        engine["devices"] = list(devices)
    report(f"{path}.judge_model_type", "a vLLM server runs the judge, on the block's model and devices")
    omitted = ("judge_model_type", "model_args", "device_mapping")
    kept = {key: value for key, value in block.items() if key not in omitted}
    return kept | {"worker_args": arguments | {"engine": engine}}
