"""A tool: a function, the schema that the model reads, and the check of its arguments."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import docstring_parser
import jsonschema
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ArgsKwargs

from roll_gspo.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_MAX_PROBLEMS, _MAX_CHARS_OF_PROBLEM = 3, 200


class ToolError(Exception):
    """A call that a tool cannot serve. The model reads the text."""


class ArgumentsError(ToolError):
    """Arguments that do not fit the schema of a tool."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: name by which the model calls it.
        schema: description for the chat template: `{type: function, function: {name, description, parameters}}`.
        check: function that returns the keyword arguments of a call, converted to the types of the signature. It raises
            `ArgumentsError`.
        function: the function itself. Threads call it at the same time.
        timeout_s: seconds per call.
    """

    name: str
    schema: Mapping[str, Any]
    check: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    function: Callable[..., Any]
    timeout_s: float

    @property
    def usage(self) -> str:
        """Name and arguments in one line, e.g. `search(query: string, limit?: integer)`."""
        parameters = self.schema["function"]["parameters"]
        required = parameters.get("required", ())
        properties = parameters.get("properties", {}).items()
        return f"{self.name}({', '.join(_described(key, kind, key in required) for key, kind in properties)})"


def tool_from_signature(function: Callable[..., Any], name: str, timeout_s: float) -> Tool:
    """Return a tool whose schema is made from the signature and the docstring of a function.

    The description of the tool is the docstring without its sections. Arguments are described in the docstring, or by
    `Annotated[..., pydantic.Field(description=...)]`.

    Args:
        function: function with type hints, or an object with `__call__`.
        name: name for the model.
        timeout_s: seconds per call.

    Raises:
        ConfigError: the function is async, has arguments without a name, or its types have no JSON schema.
    """
    plain = function if inspect.isroutine(function) else function.__call__
    what = f"tool {name}"
    for parameter in inspect.signature(plain).parameters.values():
        if parameter.kind not in _NAMED_KINDS:
            raise ConfigError(f"{what}: the argument {parameter.name} cannot be named; name it, or give a schema")
    refuse_async(plain, what)

    @functools.wraps(plain)
    def bound(**arguments: Any) -> Mapping[str, Any]:
        return arguments

    kind: Any = bound
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        parameters = adapter.json_schema(schema_generator=_SchemaWithoutTitles)
    except (PydanticUserError, NameError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{what}: the signature has no JSON schema ({first}); correct its types") from error
    docs = docstring_parser.parse(inspect.getdoc(plain) or inspect.getdoc(function) or "")
    for parameter in docs.params:
        if parameter.arg_name in parameters.get("properties", {}) and parameter.description:
            parameters["properties"][parameter.arg_name].setdefault("description", _one_line(parameter.description))
    parameters.pop("additionalProperties", None)
    parameters.setdefault("properties", {})

    def check(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return adapter.validate_python(ArgsKwargs((), dict(arguments)))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc'])) or 'arguments'}: {one['msg']}" for one in error.errors()]
            raise ArgumentsError(_joined(problems)) from None

    description = "\n\n".join(text for text in (docs.short_description, docs.long_description) if text)
    return Tool(_checked_name(name), _schema(name, description, parameters), check, function, timeout_s)


def tool_from_schema(function: Callable[..., Any], schema: Mapping[str, Any], timeout_s: float) -> Tool:
    """Return a tool with a given schema.

    Args:
        function: function that takes the arguments of the schema as keywords.
        schema: `{name, description, parameters}`, perhaps inside `{type: function, function: ...}`; `parameters` is a
            JSON schema of an object.
        timeout_s: seconds per call.

    Raises:
        ConfigError: the schema has no name, or its parameters are no JSON schema.
    """
    inner = schema.get("function", schema)
    name = _checked_name(str(inner.get("name", "")))
    refuse_async(function if inspect.isroutine(function) else function.__call__, f"tool {name}")
    parameters = inner.get("parameters") or {"type": "object", "properties": {}}
    try:
        jsonschema.Draft202012Validator.check_schema(parameters)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"tool {name}: parameters are no JSON schema ({error.message}); correct them") from error
    validator = jsonschema.Draft202012Validator(parameters)

    def check(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        errors = sorted(validator.iter_errors(dict(arguments)), key=lambda error: error.json_path)
        if errors:
            raise ArgumentsError(_joined([f"{one.json_path[2:] or 'arguments'}: {one.message}" for one in errors]))
        return arguments

    return Tool(name, _schema(name, str(inner.get("description", "")), parameters), check, function, timeout_s)


class _SchemaWithoutTitles(GenerateJsonSchema):
    """Generates schemas without titles, which repeat the names and cost tokens of the prompt."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def get_title_from_name(self, name: str) -> str:
        return ""


def refuse_async(function: Callable[..., Any], what: str) -> None:
    """Check that a function is not async.

    Raises:
        ConfigError: it is.
    """
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(
            f"{what}: it is async, but tools are called as plain functions in threads; remove async, or run the "
            "coroutine inside with asyncio.run"
        )


def _schema(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": dict(parameters)},
    }


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"tools: the name '{name}' has other characters than letters, digits, _ and -; give a name")
    return name


def _described(name: str, schema: Mapping[str, Any], is_required: bool) -> str:
    kind = schema.get("type", "any")
    return f"{name}{'' if is_required else '?'}: {kind if isinstance(kind, str) else ' or '.join(kind)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _joined(problems: list[str]) -> str:
    return "; ".join(problem[:_MAX_CHARS_OF_PROBLEM] for problem in problems[:_MAX_PROBLEMS])
