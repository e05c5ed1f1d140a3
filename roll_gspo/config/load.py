"""Composed YAML in, one frozen `ExperimentConfig` out; every problem is reported at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.legacy import LATER_VALUES, sift
from roll_gspo.config.sources import Sources
from roll_gspo.errors import ConfigError
from roll_gspo.registry import did_you_mean


@dataclass(frozen=True)
class Loaded:
    """A valid configuration and what the user should know about it."""

    config: ExperimentConfig
    warnings: tuple[str, ...]


def load(composed: DictConfig, sources: Sources, choices: Mapping[str, str]) -> Loaded:
    """Validate a composed configuration.

    Args:
        composed: what Hydra composed, interpolations unresolved.
        sources: where its keys were written, for the error messages.
        choices: option chosen of each config group, as Hydra recorded it.

    Raises:
        ConfigError: its message has one line a problem: where, key path, what is wrong, what to do.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        path = tuple(str(error.full_key or "").split("."))
        text = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{sources.locate(path)}{'.'.join(path)}: {text}") from error
    if not isinstance(values, dict):
        raise ConfigError("the configuration is not a mapping of keys")
    sifted = sift({str(k): v for k, v in values.items()})
    problems = [f"{sources.locate(tuple(p.split('.')))}{p}: {text}" for p, text in sifted.refusals]
    problems += _overridden_choices(sifted.values, choices, sources)
    try:
        config = ExperimentConfig.model_validate(sifted.values)
    except ValidationError as error:
        problems += _problems_of(error, sources)
        raise ConfigError("\n".join(sorted(dict.fromkeys(problems)))) from error
    if problems:
        raise ConfigError("\n".join(sorted(dict.fromkeys(problems))))
    return Loaded(config, sifted.warnings)


def _overridden_choices(values: Mapping[str, Any], choices: Mapping[str, str], sources: Sources) -> list[str]:
    """A group option that a later line of the body overrides would be ignored silently: refuse it."""
    problems = []
    for group, chosen in choices.items():
        value = values.get(group)
        if isinstance(value, str) and chosen is not None and value != chosen:
            problems.append(
                f"{sources.locate((group,))}{group}: the defaults list or the command line chose '{chosen}', but "
                f"this line says '{value}' and would win; remove it"
            )
    return problems


def _problems_of(error: ValidationError, sources: Sources) -> list[str]:
    problems = []
    details = error.errors(include_url=False)
    missing = {tuple(d["loc"]) for d in details if d["type"] == "missing"}
    for detail in details:
        path = _yaml_path(detail["loc"])
        if detail["type"] == "extra_forbidden":
            text = _unknown_key(path, missing)
        elif detail["type"] == "missing":
            if any(_is_near(d, detail) for d in details if d["type"] == "extra_forbidden"):
                continue  # the misspelt key beside it says the same
            text = f"{'.'.join(path)}: missing; add it"
        else:
            text = _wrong_value(path, dict(detail))
        where = sources.locate(path or _first_key(text))
        problems.append(f"{where}{text}")
    return problems


def _is_near(extra: Any, missing: Any) -> bool:
    same_block = extra["loc"][:-1] == missing["loc"][:-1]
    return same_block and bool(did_you_mean(str(extra["loc"][-1]), [str(missing["loc"][-1])]))


def _yaml_path(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """A pydantic location without the tags of discriminated unions, which are not YAML keys."""
    tags = {"megatron_train", "megatron_infer", "hf_train", "hf_infer", "vllm"}
    path = []
    for part in location:
        if part in tags and path and path[-1] == "strategy_args":
            continue
        path.append(str(part))
    return tuple(path)


def _unknown_key(path: tuple[str, ...], missing: set[tuple[int | str, ...]]) -> str:
    known = known_keys(path[:-1])
    hint = did_you_mean(path[-1], known)
    listed = "" if hint else f" (known here: {', '.join(known)})" if len(known) <= 30 else ""
    return f"{'.'.join(path)}: unknown key{hint}{listed}"


def _wrong_value(path: tuple[str, ...], detail: dict[str, Any]) -> str:
    dotted, value = ".".join(path), detail["input"]
    if detail["type"] == "value_error":
        text = str(detail["ctx"]["error"])
        return f"{dotted}: {text}" if path else text
    if isinstance(value, str) and value in LATER_VALUES.get(dotted, {}):
        return f"{dotted}: not supported yet: {LATER_VALUES[dotted][value]} ('{value}')"
    if detail["type"] == "literal_error":
        options = [o.strip("' ") for o in re.split(r", | or ", detail["ctx"]["expected"])]
        hint = did_you_mean(str(value), options)
        return f"{dotted}: expected one of {', '.join(options)}, got {value!r}{hint}"
    if detail["type"] == "union_tag_invalid":
        return f"{dotted}.strategy_name: expected one of {detail['ctx']['expected_tags']}, got {detail['ctx']['tag']!r}"
    if detail["type"] == "union_tag_not_found":
        return f"{dotted}.strategy_name: missing; add it"
    message = detail["msg"]
    return f"{dotted}: {message[0].lower()}{message[1:]}, got {value!r} ({type(value).__name__})"


def _first_key(text: str) -> tuple[str, ...]:
    """The first key that a rule's message names: where to look first."""
    match = re.match(r"[a-z_]+(\.[a-z_]+)*", text)
    return tuple(match[0].split(".")) if match else ()


def known_keys(path: tuple[str, ...]) -> list[str]:
    """The keys that the block at `path` may have."""
    models: list[type[BaseModel]] = [ExperimentConfig]
    for part in path:
        found: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                found += _models_in(model.model_fields[part].annotation)
            elif len(models) == 1 and not found:
                found = models  # a name the user chose, such as a reward domain
        models = found or models
    return sorted({key for model in models for key in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    if origin in (Union, UnionType, Annotated, dict):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []
