"""Validation of composed YAML into a frozen `ExperimentConfig` or `SftConfig`. All problems are reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from roll_gspo.config.base import BrokenRules, Problem
from roll_gspo.config.blocks import models_in
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.legacy import LATER_VALUES, sift
from roll_gspo.config.other_pipeline import without_other_pipelines
from roll_gspo.config.pipelines import config_class
from roll_gspo.config.roll_values import convert
from roll_gspo.config.sft import AnyConfig
from roll_gspo.config.sources import Sources
from roll_gspo.config.strategy import StrategyArgs, args_class
from roll_gspo.errors import ConfigError
from roll_gspo.registry import did_you_mean


@dataclass(frozen=True)
class Loaded:
    """A valid configuration and its warnings."""

    config: AnyConfig
    warnings: tuple[str, ...]


def load(composed: DictConfig, sources: Sources, choices: Mapping[str, str]) -> Loaded:
    """Validate a composed configuration.

    Args:
        composed: configuration that Hydra composed, with unresolved interpolations.
        sources: file and line of its keys, for error messages.
        choices: chosen option per config group, as Hydra recorded it.

    Raises:
        ConfigError: if there are problems. The message has one line per problem: location, key path, problem and fix.
    """
    values, differences = convert(_resolved(composed, sources))
    sifted = sift(values)
    if "sft_train" in values and "pipeline" not in values:  # the schema of pipeline: rlvr would report missing keys
        raise ConfigError("\n".join(map(sources.line, sifted.refusals)))
    own, foreign = without_other_pipelines(sifted.values, sources)
    own = _without_unused_warm_start(own, sources)
    root, config = config_class(own), None
    problems = [sources.line(problem) for problem in (*sifted.refusals, *foreign)]
    problems += _overridden_choices(own, root, choices, sources)
    try:
        config = root.model_validate(own)
    except ValidationError as error:
        problems += _problems_of(error, own, root, sources)
    if config is None or problems:
        raise ConfigError("\n".join(sorted(set(problems), key=_by_line)))
    differing = (f"differs from ROLL: {sources.line(Problem(*difference))}" for difference in differences)
    return Loaded(config, (*sources.replacements(), *differing, *_ignored(sifted.warnings, sources)))


def _without_unused_warm_start(values: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Drop the warm start of the option `model` if the user chose another `pretrain`, which needs none."""
    is_builtin = str(values.get("pretrain")).startswith("builtin:")
    if values.get("warm_start") is None or is_builtin or not sources.set_by_option(("warm_start",)):
        return values
    return {**values, "warm_start": None}


def _ignored(warnings: tuple[tuple[str, str], ...], sources: Sources) -> Iterator[str]:
    """Yield one warning per reason. One per key would be too many: ROLL's examples contain dozens of ignored keys."""
    keys: dict[str, list[str]] = {}
    for path, reason in warnings:
        where = sources.locate(tuple(path.split("."))).removesuffix(": ")
        keys.setdefault(reason, []).append(f"{path} ({where})" if where else path)
    for reason, paths in keys.items():
        yield f"ignored, delete it: {', '.join(paths)}: {reason}"


def _resolved(composed: DictConfig, sources: Sources) -> dict[str, Any]:
    try:
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError("\n".join(sources.line(Problem(key, "must be set ('???')")) for key in missing))
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        problem = Problem(str(error.full_key or ""), str(error.msg or error).splitlines()[0])
        raise ConfigError(sources.line(problem)) from error
    if not isinstance(values, dict):
        raise ConfigError("the configuration is not a mapping of keys")
    return {str(key): value for key, value in values.items()}


def _by_line(problem: str) -> list[str | int]:
    """Return a sort key that places `file:9` before `file:10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", problem)]


def _overridden_choices(
    values: Mapping[str, Any], root: type[BaseModel], choices: Mapping[str, str], sources: Sources
) -> list[str]:
    """Return a problem per group option that a later line overrides, since it would be ignored silently."""
    problems = []
    on_command_line = {o.lstrip("+").partition("=")[0] for o in sources.overrides}
    for group, chosen in choices.items():
        key = "track_with" if group == "tracker" else group
        if key not in root.model_fields or key not in values:
            continue  # the group sets several keys
        if key != group and key in on_command_line:
            continue  # the command line sets the key directly
        if sources.set_by_option((key,)):
            continue  # a user's option may have another name than the function that it selects
        value, says = values[key], values[key]
        if key == "track_with":
            if (chosen,) == root.model_fields[key].default and group not in on_command_line:
                continue  # base.yaml starts from it
            value = says = "none" if value is None else str(value)
        if root.model_fields[key].default is None:  # `none` is the option that sets null
            if chosen == "none" and group not in on_command_line:
                continue  # the default of base.yaml, not a choice of the user
            value, says = ("none", "null") if value is None else (value, value)
        if isinstance(value, str) and value != chosen:
            problems.append(
                f"{sources.in_files((key,))}{key}: the defaults list or the command line chose '{group}: {chosen}', "
                f"but this line says '{says}' and would win; remove it, or choose it in the defaults list"
            )
    return problems


def _problems_of(
    error: ValidationError, values: Mapping[str, Any], root: type[BaseModel], sources: Sources
) -> list[str]:
    problems = []
    details: list[Any] = [dict(detail) for detail in error.errors(include_url=False)]
    for detail in details:
        path = tuple(map(str, detail["loc"]))
        dotted = ".".join(path)
        if detail["type"] == "extra_forbidden":
            known = known_keys(path[:-1], values, root)
            problems.append(f"{sources.locate(path)}{dotted}: {_unknown_key(path[-1], known)}")
        elif detail["type"] == "missing":
            if not any(_is_near(d, detail) for d in details if d["type"] == "extra_forbidden"):
                problems.append(f"{sources.locate(path)}{dotted}: missing; add it")
        elif detail["type"] == "value_error":
            problems += _rule_problems(path, detail.get("ctx", {})["error"], sources)
        else:
            problems.append(f"{sources.locate(path)}{dotted}: {_wrong_value(path, detail)}")
    return problems


def _is_near(extra: Any, missing: Any) -> bool:
    """Return whether the unknown key `extra` is probably a misspelling of the `missing` one."""
    same_block = extra["loc"][:-1] == missing["loc"][:-1]
    return same_block and bool(did_you_mean(str(extra["loc"][-1]), [str(missing["loc"][-1])]))


def _unknown_key(key: str, known: list[str]) -> str:
    hint = did_you_mean(key, known)
    listed = "" if hint else f" (known here: {', '.join(known)})" if 0 < len(known) <= 30 else ""
    return f"unknown key{hint}{listed}"


def _wrong_value(path: tuple[str, ...], detail: dict[str, Any]) -> str:
    """Return the message for an invalid value."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if isinstance(value, str) and value in LATER_VALUES.get(".".join(path), {}):
        return f"not supported yet: {LATER_VALUES['.'.join(path)][value]} ('{value}')"
    if kind == "unusable_path":
        return context["problem"]
    if kind == "literal_error":
        options = [o.strip("' ") for o in re.split(r", | or ", context["expected"])]
        return f"expected one of {', '.join(options)}, got {value!r}{did_you_mean(str(value), options)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected a block of keys, got {value!r}"
    if kind == "too_short":
        return f"expected at least one, got {value!r}"
    quote = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    message = detail["msg"].removeprefix("Input ")
    return f"{message[0].lower()}{message[1:]}, got {value!r} ({type(value).__name__}){quote}"


def _rule_problems(path: tuple[str, ...], error: ValueError, sources: Sources) -> Iterator[str]:
    """Yield a line per broken rule of the block at `path`, or one of the value at `path`."""
    if not isinstance(error, BrokenRules):
        yield f"{sources.locate(path)}{'.'.join(path)}: {error}"
        return
    for problem in error.problems:
        keys = [(*path, *key.split(".")) for key in (problem.key, *problem.also)]
        yield f"{sources.locate_any(keys)}{'.'.join(keys[0])}: {problem.message}"


def known_keys(path: Sequence[int | str], values: Any = None, root: type[BaseModel] = ExperimentConfig) -> list[str]:
    """Return the keys of the block at a path.

    Args:
        path: keys from the root. A key that the user chose, e.g. a reward domain, selects the block of its parent.
        values: the composed configuration, whose `strategy_name` selects the class of a `strategy_args` block.
        root: schema of the whole configuration.
    """
    models: list[type[BaseModel]] = [root]
    for part in map(str, path):
        values = values.get(part) if isinstance(values, Mapping) else None
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [_selected(model, values) for field in fields for model in models_in(field.annotation)]
    return sorted({key for model in models for key in model.model_fields})


def _selected(model: type[BaseModel], values: Any) -> type[BaseModel]:
    """Return the class of an engine if `model` is the base class of engines, else `model`."""
    if issubclass(model, StrategyArgs) and isinstance(values, Mapping):
        return args_class(values.get("strategy_name"), model)
    return model
