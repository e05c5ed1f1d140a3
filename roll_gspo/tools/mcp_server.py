"""Tools of an MCP server: a program that is started, or a URL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from threading import Lock
from typing import Any

from mcp import Client, MCPError, StdioServerParameters
from mcp.types import CONNECTION_CLOSED, CallToolResult, TextContent
from mcp.types import Tool as ToolDescription

from roll_gspo.errors import ConfigError, PlayError
from roll_gspo.tools.tool import ToolError
from roll_gspo.workers.event_loop import event_loop, submit

_CLOSE_TIMEOUT_S = 10.0


class McpServer:
    """A connection to an MCP server. Several threads may call its tools at the same time.

    Args:
        command: program and arguments of a server that speaks over its standard input and output. Of the environment
            variables of this process, it gets `PATH`, `HOME` and few others.
        url: address of a server that speaks Streamable HTTP, e.g. `http://127.0.0.1:8000/mcp`.
        env: further environment variables of the program.
        cwd: working directory of the program.
        start_timeout_s: seconds until the server must have listed its tools.

    Raises:
        ConfigError: not exactly one of `command` and `url` is given.
        PlayError: the server cannot be reached.

    Attributes:
        schemas: schemas of the tools for chat templates: `{type: function, function: {name, ...}}`.
    """

    def __init__(
        self,
        command: Sequence[str] | None = None,
        url: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        start_timeout_s: float = 30.0,
    ) -> None:
        if (command is None) == (url is None):
            raise ConfigError("mcp: give either command or url of the server")
        if command is None:
            self._place = str(url)
            self._server: StdioServerParameters | str = str(url)
        else:
            self._place = " ".join(command)
            program, *arguments = command
            variables = None if env is None else dict(env)
            self._server = StdioServerParameters(command=program, args=arguments, env=variables, cwd=cwd)
        self._start_timeout_s = start_timeout_s
        self._connecting = Lock()
        self._connection = self._connected()
        self.schemas = self._connection.schemas

    def call(self, name: str, arguments: Mapping[str, Any], timeout_s: float) -> str:
        """Call a tool and return its text. A server that was lost before is started, or asked, again.

        Raises:
            ToolError: the tool failed, or took longer than `timeout_s`.
            PlayError: the server is lost.
        """
        with self._connecting:
            if self._connection.is_lost:
                self._connection = self._connected()
            connection = self._connection
        calling = submit(connection.client.call_tool(name, dict(arguments)))
        try:
            result = calling.result(timeout_s)
        except FutureTimeoutError:
            calling.cancel()
            raise ToolError(f"{name} took longer than {timeout_s:g} s") from None
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise ToolError(str(error)) from None
            raise self._lost(connection, error) from None
        except Exception as error:
            raise self._lost(connection, error) from None
        text = _text_of(result)
        if result.is_error:
            raise ToolError(text)
        return text

    def close(self) -> None:
        """End the connection, and the program if it was started here."""
        self._connection.close()

    def _connected(self) -> _Connection:
        try:
            return _Connection(self._server, self._start_timeout_s)
        except FutureTimeoutError:
            raise PlayError(f"mcp: {self._place} did not answer within {self._start_timeout_s:g} s") from None
        except Exception as error:
            raise PlayError(f"mcp: {self._place} cannot be used: {_cause(error)}") from None

    def _lost(self, connection: _Connection, error: BaseException) -> PlayError:
        connection.is_lost = True
        connection.close()
        return PlayError(f"mcp: {self._place} is lost: {_cause(error)}")


class _Connection:
    """A client in the event loop, from its first answer until it is closed or lost."""

    def __init__(self, server: StdioServerParameters | str, timeout_s: float) -> None:
        self.is_lost = False
        self._closing = asyncio.Event()
        ready: Future[tuple[Client, list[dict[str, Any]]]] = Future()
        self._task = submit(self._run(server, ready))
        try:
            self.client, self.schemas = ready.result(timeout_s)
        except FutureTimeoutError:
            self._task.cancel()
            raise

    def close(self) -> None:
        """Leave the client. A started program gets some seconds to end."""
        event_loop().call_soon_threadsafe(self._closing.set)
        with suppress(FutureTimeoutError, CancelledError):
            self._task.exception(_CLOSE_TIMEOUT_S)

    async def _run(self, server: StdioServerParameters | str, ready: Future[Any]) -> None:
        # One task enters and leaves the client, because its cancel scopes belong to a task.
        try:
            async with Client(server) as client:
                ready.set_result((client, await _listed(client)))
                await self._closing.wait()
        except Exception as error:
            self.is_lost = True
            if not ready.done():
                ready.set_exception(error)


async def _listed(client: Client) -> list[dict[str, Any]]:
    """Return the schemas of all pages of tools."""
    schemas: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        schemas += [_schema(tool) for tool in page.tools]
        cursor = page.next_cursor
        if cursor is None:
            return schemas


def _schema(tool: ToolDescription) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description or "", "parameters": dict(tool.input_schema)}
    return {"type": "function", "function": function}


def _text_of(result: CallToolResult) -> str:
    texts = [part.text if isinstance(part, TextContent) else f"[{part.type}]" for part in result.content]
    if not texts and result.structured_content is not None:
        return json.dumps(result.structured_content)
    return "\n".join(texts)


def _cause(error: BaseException) -> str:
    """Return the first exception of a group, because anyio wraps the errors of its tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
