"""Tools of real MCP servers: a started program and a URL."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from roll_gspo.environments.pool import EnvironmentPool, Failure
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.errors import ConfigError, PlayError
from roll_gspo.tools import ToolError
from roll_gspo.tools.spec import build_tools

pytest.importorskip("mcp", reason="pip install 'roll-gspo[mcp]'")

from roll_gspo.tools.mcp_server import McpServer

COMMAND = [sys.executable, str(Path(__file__).with_name("mcp_numbers.py"))]
CALL_S = 30.0


@pytest.fixture(scope="module")
def server() -> Iterator[McpServer]:
    server = McpServer(command=COMMAND, env={"CITY": "Ulm"})
    yield server
    server.close()


def started_url(port: int = 0) -> tuple[subprocess.Popen[bytes], int]:
    if not port:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
    server = subprocess.Popen([*COMMAND, str(port)])
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    return server, port


def test_schemas_are_those_of_chat_templates(server: McpServer):
    multiply = server.schemas[0]
    assert (multiply["type"], multiply["function"]["name"]) == ("function", "multiply")
    assert multiply["function"]["description"] == "Multiply two numbers."
    parameters = multiply["function"]["parameters"]
    assert parameters["required"] == ["a", "b"]
    assert parameters["properties"]["a"]["type"] == "integer"
    assert len(server.schemas) == 5


def test_program_answers_calls_of_many_threads(server: McpServer):
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda n: server.call("multiply", {"a": n, "b": 3}, CALL_S), range(24)))
    assert answers == [str(3 * number) for number in range(24)]
    assert server.call("environment", {"name": "CITY"}, CALL_S) == "Ulm"


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [("fail", {}, "no luck"), ("multiply", {"a": "x", "b": 1}, "validation"), ("divide", {}, "Unknown tool: divide")],
)
def test_failed_call_is_an_answer_for_the_model(server: McpServer, name: str, arguments: dict[str, Any], text: str):
    with pytest.raises(ToolError, match=text):
        server.call(name, arguments, CALL_S)
    assert server.call("multiply", {"a": 1, "b": 1}, CALL_S) == "1"


def test_late_call_is_an_answer_for_the_model(server: McpServer):
    with pytest.raises(ToolError, match=r"wait took longer than 0.1 s"):
        server.call("wait", {"seconds": 1}, 0.1)


def test_lost_program_is_a_failure_and_the_next_call_starts_it_again():
    before = set(psutil.Process().children())
    server = McpServer(command=COMMAND)
    with pytest.raises(PlayError, match="is lost"):
        server.call("die", {}, CALL_S)
    assert server.call("multiply", {"a": 2, "b": 2}, CALL_S) == "4"
    server.close()
    assert set(psutil.Process().children()) == before


def test_url_answers_calls_also_after_a_restart_of_the_server():
    process, port = started_url()
    with process:
        server = McpServer(url=f"http://127.0.0.1:{port}/mcp")
        assert server.call("multiply", {"a": 6, "b": 7}, CALL_S) == "42"
        process.kill()
    with pytest.raises(PlayError, match="is lost"):
        server.call("multiply", {"a": 6, "b": 7}, CALL_S)
    process, _ = started_url(port)
    with process:
        assert server.call("multiply", {"a": 6, "b": 7}, CALL_S) == "42"
        server.close()
        process.kill()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ConfigError, "give either command or url"),
        ({"command": ["/nowhere/server"]}, PlayError, "/nowhere/server cannot be used: FileNotFoundError"),
        ({"command": [sys.executable, "-c", "print('hello')"]}, PlayError, "cannot be used"),
        ({"url": "http://127.0.0.1:9/mcp"}, PlayError, "127.0.0.1:9/mcp cannot be used"),
    ],
)
def test_server_that_cannot_be_reached_is_named(options: dict[str, Any], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        McpServer(**options)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mcp": {"program": "x"}}, r"tools\[0\].mcp: got an unexpected keyword argument 'program'"),
        (
            {"mcp": {"command": COMMAND}, "names": ["divide"]},
            r"names: the server has no tool 'divide' \(mult",
        ),
        ({"mcp": {"command": COMMAND}, "name": "x"}, r"tools\[0\].name"),
    ],
)
def test_wrong_entry_is_named(entry: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build_tools([entry])


def test_environment_calls_the_server_of_its_process():
    entry = {"mcp": {"command": COMMAND}, "names": ["multiply", "die"]}
    spec = EnvironmentSpec("tool_use", {"tools": ["calculator", entry], "reward": "math_rule"})
    row = {"id": "1", "ground_truth": "408", "messages": [{"role": "user", "content": "What is 12 * 34?"}]}
    with EnvironmentPool(spec, 1, 4, 100.0, "custom_envs.tools") as pool:

        def result() -> Any:
            (played,) = pool.take(100.0)
            return played.result

        for episode in (1, 2):
            pool.start(episode, row, 0)
            assert [tool["function"]["name"] for tool in result().tools] == ["calculator", "multiply", "die"]
        pool.step(1, 1, '<tool_call>{"name": "multiply", "arguments": {"a": "12"}}</tool_call>')
        wrong = result()
        assert wrong.invalid and "'b' is a required property" in wrong.messages[0]["content"]
        pool.step(1, 2, '<tool_call>{"name": "multiply", "arguments": {"a": 12, "b": 34}}</tool_call>')
        assert result().messages[0]["content"] == "408"
        pool.step(1, 3, "It is 408.")
        assert result().reward == 1.0
        pool.step(2, 1, '<tool_call>{"name": "die", "arguments": {}}</tool_call>')
        failure = result()
        assert isinstance(failure, Failure) and "is lost" in failure.reason
