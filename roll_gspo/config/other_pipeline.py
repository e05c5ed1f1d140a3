"""Keys of other pipelines: removed if a group option sets them, refused if the user wrote them.

Options such as `model=qwen2.5_7b` or `strategy=hf` contain the keys of all pipelines. Each pipeline reads its own keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from roll_gspo.config.base import Problem
from roll_gspo.config.blocks import models_in
from roll_gspo.config.pipelines import DEFAULT, config_class, shipped_config_classes
from roll_gspo.config.sources import Sources

Models = list[type[BaseModel]]


def without_other_pipelines(values: dict[str, Any], sources: Sources) -> tuple[dict[str, Any], list[Problem]]:
    """Return the keys that this pipeline reads, and a problem per key that the user has to remove."""
    own = config_class(values)
    name = values.get("pipeline", DEFAULT)
    others = {other: model for other, model in shipped_config_classes().items() if not issubclass(own, model)}
    problems: list[Problem] = []

    def visit(node: dict[str, Any], mine: Models, theirs: Models, path: tuple[str, ...]) -> dict[str, Any]:
        if mine == theirs:
            return node
        kept = {}
        for key, value in node.items():
            place = (*path, key)
            here, there = (list(_below(models, key)) for models in (mine, theirs))
            if isinstance(value, dict) and here and there:
                kept[key] = visit(value, here, there, place)
            elif _knows(mine, key) or not _knows(theirs, key):
                kept[key] = value
            elif not sources.set_by_option(place):
                readers = " or ".join(others)
                message = f"is used only with pipeline: {readers}, and this is {name}; remove it"
                problems.append(Problem(".".join(place), message))
        return kept

    kept = visit(values, [own], list(others.values()), ())
    known_elsewhere = {key for model in others.values() for key in model.model_fields} - set(own.model_fields)
    for group, option in sources.idle_options(known_elsewhere):
        problems.append(Problem(group, f"'{option}' sets only keys that pipeline: {name} does not use; remove it"))
    return kept, problems


def _knows(models: Models, key: str) -> bool:
    return any(key in model.model_fields for model in models)


def _below(models: Models, key: str) -> Iterator[type[BaseModel]]:
    for model in models:
        if key in model.model_fields:
            yield from models_in(model.model_fields[key].annotation)
