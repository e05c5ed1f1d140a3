"""The type of keys that select a function: a shipped name, or the dotted path of a user's function."""

from __future__ import annotations

from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from roll_gspo.declarations import Functions
from roll_gspo.errors import ConfigError
from roll_gspo.registry import did_you_mean, is_dotted_path


class Selects:
    """Annotation of a string key: its value must be a shipped name or the path of a function with a declaration.

    Args:
        functions: what the key selects. A user's module is imported when a configuration is validated.
    """

    def __init__(self, functions: Functions[Any]) -> None:
        self._functions = functions

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"enum": list(self._functions)}, {"type": "string", "format": "dotted path"}]}

    def _validate(self, name: str) -> str:
        known = list(self._functions)
        if name not in known and not is_dotted_path(name):
            raise _problem(
                f"expected one of {', '.join(known)}, or the dotted path of your function, got '{name}'"
                f"{did_you_mean(name, known)}"
            )
        try:
            self._functions.declaration(name)
        except ConfigError as error:
            raise _problem(str(error).removeprefix(f"{self._functions.kind}: ")) from error
        return name


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("unusable_path", "{problem}", {"problem": text})
