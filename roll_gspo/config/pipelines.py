"""The registry of pipelines, and the schema of the whole configuration that each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from roll_gspo.errors import ConfigError
from roll_gspo.registry import Registry

PIPELINES = Registry(
    "pipeline",
    {
        "rlvr": "roll_gspo.pipelines.rlvr.pipeline:RlvrPipeline",
        "sft": "roll_gspo.pipelines.sft.pipeline:SftPipeline",
    },
)
DEFAULT = "rlvr"


def config_class(values: Mapping[str, Any]) -> type[Any]:
    """Return the schema of a composed configuration. An unknown `pipeline` gets the default's, which reports it."""
    name = values.get("pipeline", DEFAULT)
    try:
        return PIPELINES.load(name if isinstance(name, str) else DEFAULT).config_class
    except ConfigError:
        return PIPELINES.load(DEFAULT).config_class


def shipped_config_classes() -> dict[str, type[Any]]:
    """Return the schema of every shipped pipeline by name."""
    return {name: PIPELINES.load(name).config_class for name in PIPELINES}


def _check(name: str) -> str:
    try:
        PIPELINES.load(name)
    except ConfigError as error:
        problem = str(error).removeprefix("pipeline: ")
        raise PydanticCustomError("unusable_path", "{problem}", {"problem": problem}) from error
    return name


PipelineName = Annotated[str, AfterValidator(_check)]
