"""Episodes with tools, played in worker processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from roll_gspo.environments import Reply, Start
from roll_gspo.environments.pool import EnvironmentPool, Failure
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.errors import ConfigError

WAIT_S = 100.0
TOOLS = ["calculator", "own_tools.weather", "own_tools.failing"]
ROW = {"id": "1", "ground_truth": "408", "messages": [{"role": "user", "content": "What is 12 * 34?"}]}


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(f"{__file__.rpartition('/')[0]}/../tools")
        yield


@pytest.fixture(scope="module")
def pool(importable: None) -> Iterator[EnvironmentPool]:
    spec = EnvironmentSpec("tool_use", {"tools": TOOLS, "reward": "math_rule", "max_invalid": 1})
    with EnvironmentPool(spec, 1, 16, 60.0, "custom_envs.tools") as made:
        yield made


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_worker_imports_no_torch() -> None:
    code = (
        "import sys; import roll_gspo.environments.worker, roll_gspo.environments.tool_use; "
        "print(sorted({'torch', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout == "[]\n", done.stderr


class Played:
    """One episode, played turn by turn."""

    def __init__(self, pool: EnvironmentPool, number: int, row: dict[str, Any]) -> None:
        self._pool, self._number, self._turn = pool, number, 0
        pool.start(number, row, 0)
        self.start = self._result()

    def step(self, answer: str) -> Any:
        self._turn += 1
        self._pool.step(self._number, self._turn, answer)
        return self._result()

    def _result(self) -> Start | Reply | Failure:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            if found := self._pool.take(1.0):
                return found[0].result
        raise AssertionError("there is no result")


def test_episode_with_a_call(pool: EnvironmentPool) -> None:
    played = Played(pool, 1, ROW)
    assert isinstance(played.start, Start)
    assert played.start.messages == tuple(ROW["messages"])
    assert [tool["function"]["name"] for tool in played.start.tools] == ["calculator", "weather", "failing"]
    reply = played.step(f"<think>I call {call('weather')}</think>" + call("calculator", expression="12 * 34"))
    message = {"role": "tool", "name": "calculator", "content": "408", "tool_call_id": "000000001"}
    metrics = {"tool_calls": 1, "tool_errors": 0, "invalid_calls": 0}
    assert reply == Reply((message,), metrics=metrics)
    assert played.step("The answer is 408.") == Reply(reward=1.0, done=True, metrics={"tool_calls": 0})
    assert Played(pool, 2, ROW).step("It is 407.") == Reply(done=True, metrics={"tool_calls": 0})


def test_calls_of_a_turn_are_answered_in_order(pool: EnvironmentPool) -> None:
    reply = Played(pool, 3, ROW).step(
        call("calculator", expression="1/0") + call("weather", city="Bern") + call("calculator", expression="2")
    )
    assert [message["content"] for message in reply.messages] == [
        "error: division by zero",
        '{"city": "Bern", "days": 1, "degrees": 20, "unit": "C"}',
        "2",
    ]
    assert [message["tool_call_id"] for message in reply.messages] == ["000000001", "000000002", "000000003"]
    assert reply.metrics == {"tool_calls": 3, "tool_errors": 1, "invalid_calls": 0}
    assert not reply.invalid


def test_malformed_calls_are_explained_and_end_the_episode(pool: EnvironmentPool) -> None:
    played = Played(pool, 4, ROW)
    first = played.step("<tool_call>calculator(12 * 34)</tool_call>")
    assert first.invalid and not first.done and first.metrics["invalid_calls"] == 1
    assert first.messages[0]["content"].startswith("error: malformed call: invalid JSON")
    last = played.step(call("calculator", formula="12 * 34"))
    assert last == Reply(done=True, invalid=True, metrics={"tool_calls": 1, "tool_errors": 0, "invalid_calls": 1})


def test_broken_tool_or_reward_fails_the_episode(pool: EnvironmentPool) -> None:
    failure = Played(pool, 5, ROW).step(call("failing", kind="broken"))
    assert isinstance(failure, Failure) and failure.reason.startswith("RuntimeError: no ")
    assert "own_tools.py" in failure.traceback
    failure = Played(pool, 6, {**ROW, "ground_truth": ""}).step("408")
    assert isinstance(failure, Failure)
    assert failure.reason.startswith("PlayError: the reward failed: ValueError: math_rule: the ground truth ''")
    failure = Played(pool, 7, {"id": "seed 3"}).start
    assert isinstance(failure, Failure) and "row seed 3: no messages" in failure.reason


def test_reward_may_be_a_block_and_tools_may_be_hidden() -> None:
    parts = {
        "right": {"worker_cls": "exact_match"},
        "short": {"worker_cls": "length", "worker_args": {"max_length": 9}},
    }
    reward = {"combine": "weighted_sum", "parts": parts}
    arguments = {"tools": ["calculator"], "reward": reward, "format": "mistral", "show_tools": False}
    with EnvironmentPool(EnvironmentSpec("tool_use", arguments), 1, 1, 60.0, "custom_envs.tools") as pool:
        played = Played(pool, 1, ROW)
        assert isinstance(played.start, Start) and not played.start.tools
        reply = played.step('[TOOL_CALLS]calculator[CALL_ID]abcdefghi[ARGS]{"expression": "12*34"}')
        assert reply.messages[0] == {
            "role": "tool",
            "name": "calculator",
            "content": "408",
            "tool_call_id": "abcdefghi",
        }
        final = played.step("so:408")
        assert final.done and final.reward == 1.0 and final.metrics["right"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": "math_rule", "format": "hermess"}, "format is 'hermess'; did you mean 'hermes'?"),
        ({"reward": "math_rul"}, "reward.worker_cls: .*unknown reward 'math_rul'"),
        ({"reward": "math_rule", "tools": ["calc"]}, "tools: unknown name 'calc'"),
        ({}, "missing a required argument: 'reward'"),
        ({"reward": {"worker_cls": "length", "worker_args": {"x": 1}}}, "unexpected keyword argument 'x'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    spec = EnvironmentSpec("tool_use", {"tools": ["calculator"], **arguments})
    with EnvironmentPool(spec, 1, 1, 60.0, "custom_envs.tools") as pool:
        pool.start(1, ROW, 0)
        with pytest.raises(ConfigError, match=f"custom_envs.tools: .*{message}"):
            pool.take(WAIT_S)
