"""An MCP server of the tests: over standard input and output, or over HTTP on the port that is its argument."""

from __future__ import annotations

import os
import sys
import time

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("numbers", log_level="CRITICAL")


@server.tool()
def multiply(a: int, b: int) -> str:
    """Multiply two numbers."""
    return str(a * b)


@server.tool()
def environment(name: str) -> str:
    """Return a variable of the server."""
    return os.environ.get(name, "unset")


@server.tool()
def fail() -> str:
    """Raise an exception."""
    raise ToolError("no luck")


@server.tool()
def wait(seconds: float) -> str:
    """Wait."""
    time.sleep(seconds)
    return "done"


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(7)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
