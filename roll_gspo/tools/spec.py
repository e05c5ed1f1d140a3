"""The shipped tools, and building tools from the entries of a configuration."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, JsonValue, PositiveFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from roll_gspo.errors import ConfigError
from roll_gspo.registry import Registry, import_target
from roll_gspo.tools.tool import Tool, tool_from_schema, tool_from_signature

TOOLS = Registry(
    "tools",
    {
        "calculator": "roll_gspo.tools.calculator:calculate",
        "python": "roll_gspo.tools.python_code:PythonCode",
        "search": "roll_gspo.tools.search:Search",
    },
)
Entry = TypeVar("Entry")
_CAPITAL = re.compile(r"(?<!^)(?=[A-Z])")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ToolEntry:
    """An entry of `tools`.

    Attributes:
        type: shipped tool, or the dotted path of a function or a class with `__call__`.
        name: name for the model; None for the shipped name, or that of the function or class.
        arguments: keyword arguments of the class. One object is built per process.
        schema: file with a JSON schema `{name, description, parameters}`; None to make it from the signature.
        timeout_s: seconds per call.
    """

    type: str
    name: str | None = None
    arguments: dict[str, JsonValue] | None = None
    schema: str | None = None
    timeout_s: PositiveFloat = 20.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class McpEntry:
    """An entry of `tools` for the tools of an MCP server, to which each process has one connection.

    Attributes:
        mcp: keyword arguments of `McpServer`: `command` or `url`, and `env`, `cwd`, `start_timeout_s`.
        names: tools to offer to the model; None for all.
        timeout_s: seconds per call.
    """

    mcp: dict[str, JsonValue]
    names: list[str] | None = None
    timeout_s: PositiveFloat = 20.0


_ENTRIES, _MCP_ENTRIES = TypeAdapter(ToolEntry), TypeAdapter(McpEntry)


def build_tools(entries: Sequence[Any]) -> dict[str, Tool]:
    """Import and build tools, and return them by name.

    Args:
        entries: names of tools, or the fields of a `ToolEntry` or `McpEntry`.

    Raises:
        ConfigError: an entry is wrong, a tool cannot be built, or two have the same name.
        MissingDependencyError: a package that a tool imports is not installed.
        PlayError: an MCP server cannot be reached.
    """
    if isinstance(entries, str) or not entries:
        raise ConfigError(f"tools is {entries!r}; write a list, e.g. [calculator]")
    tools: dict[str, Tool] = {}
    for number, entry in enumerate(entries):
        for tool in _tools_of(entry, f"tools[{number}]"):
            if tool.name in tools:
                raise ConfigError(f"tools[{number}]: there are two tools '{tool.name}'; give one another name")
            tools[tool.name] = tool
    return tools


def _tools_of(entry: Any, key: str) -> list[Tool]:
    if isinstance(entry, Mapping) and "mcp" in entry:
        return _mcp_tools(_validated(_MCP_ENTRIES, entry, key), key)
    return [_build(_validated(_ENTRIES, {"type": entry} if isinstance(entry, str) else entry, key))]


def _mcp_tools(entry: McpEntry, key: str) -> list[Tool]:
    kind = import_target("roll_gspo.tools.mcp_server:McpServer", f"{key}.mcp")
    server = _built(kind, entry.mcp, f"{key}.mcp")
    schemas = {schema["function"]["name"]: schema for schema in server.schemas}
    for name in entry.names or ():
        if name not in schemas:
            raise ConfigError(f"{key}.names: the server has no tool '{name}' ({', '.join(schemas)}); correct the name")

    def called(name: str) -> Callable[..., str]:
        return lambda **arguments: server.call(name, arguments, entry.timeout_s)

    return [tool_from_schema(called(name), schemas[name], entry.timeout_s) for name in entry.names or schemas]


def _validated(adapter: TypeAdapter[Entry], value: Any, key: str) -> Entry:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([key, *map(str, first["loc"])])
        raise ConfigError(f"{path}: {first['msg']} ({first['input']!r}); correct it") from None


def _build(entry: ToolEntry) -> Tool:
    what = f"tool {entry.type}"
    target = import_target(TOOLS[entry.type], what)
    name = entry.name or (entry.type if entry.type in TOOLS else _CAPITAL.sub("_", str(target.__name__)).lower())
    function = _function(target, entry.arguments or {}, what)
    if entry.schema is None:
        return tool_from_signature(function, name, entry.timeout_s)
    schema = _read_schema(entry.schema, what)
    inner = schema.get("function", schema)
    return tool_from_schema(function, {**inner, "name": entry.name or inner.get("name", name)}, entry.timeout_s)


def _built(kind: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> Any:
    signature = inspect.signature(kind)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}; its signature is {signature}") from error
    return kind(**arguments)


def _function(target: Any, arguments: Mapping[str, Any], what: str) -> Callable[..., Any]:
    if inspect.isclass(target):
        target = _built(target, arguments, what)
    elif arguments:
        raise ConfigError(f"{what}: is a function, and arguments are for a class; write a class, or remove them")
    if not callable(target):
        raise ConfigError(f"{what}: is of type {type(target).__name__}; name a function or a class with __call__")
    return target


def _read_schema(path: str, what: str) -> Mapping[str, Any]:
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what}: schema: {path} cannot be read ({error}); correct the file or the path") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"{what}: schema: {path} is no JSON object; write {{name, description, parameters}}")
    return schema
