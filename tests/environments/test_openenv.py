"""Episodes in sessions of a real OpenEnv server. The package has a virtual environment, because vLLM's conflicts."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from package_venvs import python_with

from roll_gspo.environments import Reply, Start
from roll_gspo.environments.pool import EnvironmentPool, Failure
from roll_gspo.environments.spec import EnvironmentSpec

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # downloads packages
SERVER = Path(__file__).with_name("openenv_counter.py")
OPTIONS = {
    "action": "openenv_counter.add",
    "observation": "openenv_counter.total",
    "action_pattern": r"<add>(.*)</add>",
}


def started_server(python: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = subprocess.Popen([python, str(SERVER), str(port)])
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    return server, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return python_with("openenv", tmp_path_factory)


@pytest.fixture(scope="module")
def url(python: str) -> Iterator[str]:
    server, url = started_server(python)
    with server:
        yield url
        server.kill()


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def pool_of(python: str, timeout_s: float = 60.0, **options: Any) -> EnvironmentPool:
    return EnvironmentPool(EnvironmentSpec("openenv", options, python), 1, 8, timeout_s, "custom_envs.counter")


def result(pool: EnvironmentPool) -> Any:
    (played,) = pool.take(60.0)
    return played.result


def user(text: str) -> tuple[dict[str, str]]:
    return ({"role": "user", "content": text},)


def test_functions_map_texts_to_actions_and_observations_to_texts(python: str, url: str):
    with pool_of(python, base_url=url, instruction="Reach 12.", **OPTIONS) as pool:
        pool.start(1, {"options": {"goal": 12}}, 3)
        assert result(pool) == Start(user("Reach 12.\n\ntotal 3"))
        pool.start(2, {}, 8)  # another session of the server
        assert result(pool) == Start(user("Reach 12.\n\ntotal 8"))
        pool.step(1, 1, "first <add>4</add>")
        assert result(pool) == Reply(user("total 7"), reward=0.0)
        pool.step(2, 1, "<add>3</add>")
        assert result(pool) == Reply(reward=0.0, done=True)  # 11 is more than the goal
        pool.step(1, 2, "<add>four</add>")
        assert result(pool) == Reply(user("'<add>four</add>' is no action."), invalid=True)
        pool.step(1, 3, "<add>5</add>")
        assert result(pool) == Reply(reward=1.0, done=True)


def test_fields_are_texts_and_rejected_actions_are_invalid_turns(python: str, url: str):
    with pool_of(python, base_url=url, action="number") as pool:
        pool.start(1, {}, 2)
        assert result(pool) == Start(user('{"total": 2}'))
        pool.step(1, 1, "many")
        rejected = result(pool)
        assert rejected.invalid and "VALIDATION_ERROR" in rejected.messages[0]["content"]
        pool.step(1, 2, "1")
        assert result(pool) == Reply(user('{"total": 3}'), reward=0.0)


def test_exception_of_the_server_and_lost_server_are_failures(python: str, url: str):
    server, own_url = started_server(python)
    with server, pool_of(python, base_url=own_url, **OPTIONS) as pool:
        pool.start(1, {}, 0)
        result(pool)
        pool.step(1, 1, "<add>666</add>")
        failure = result(pool)
        assert isinstance(failure, Failure) and "not this number" in failure.reason
        pool.start(2, {}, 0)
        result(pool)
        server.kill()
        server.wait()
        pool.step(2, 1, "<add>1</add>")
        failure = result(pool)
        assert isinstance(failure, Failure) and "onnect" in failure.reason


def test_late_server_is_a_failure(python: str, url: str):
    with pool_of(python, 2.0, base_url=url, **OPTIONS) as pool:
        pool.start(1, {}, 0)
        result(pool)
        pool.step(1, 1, "<add>60</add>")
        assert result(pool) == Failure("timeout after 2 s")


def test_wrong_field_names_the_fields(python: str, url: str):
    with pool_of(python, base_url=url, action="number", observation="text") as pool:
        pool.start(1, {}, 2)
        failure = result(pool)
        assert isinstance(failure, Failure)
        assert "the server's observation has no text (metadata, total)" in failure.reason
