"""Episodes in worker processes: results, failures, many at once, and the end of the processes."""

from __future__ import annotations

import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from roll_gspo.environments import Reply, Start
from roll_gspo.environments.pool import EnvironmentPool, Failure, Played
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.errors import ConfigError, PlayError

ECHO = EnvironmentSpec("played_environments.Echo")
WAIT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def importable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(__file__.rpartition("/")[0])
        yield


@pytest.fixture(scope="module")
def shared_pool(importable: None) -> Iterator[EnvironmentPool]:
    with EnvironmentPool(ECHO, 1, 64, 30.0, "custom_envs.echo") as pool:
        yield pool


def results(pool: EnvironmentPool, count: int) -> dict[int, Played]:
    """Wait for `count` results and return them by episode."""
    found: list[Played] = []
    until = time.monotonic() + WAIT_S
    while len(found) < count and time.monotonic() < until:
        found += pool.take(0.5)
    assert len(found) == count, found
    return {played.episode: played for played in found}


def begun(pool: EnvironmentPool, *episodes: int, **row: Any) -> dict[int, Played]:
    for episode in episodes:
        pool.start(episode, {"text": "hello", **row}, seed=episode)
    return results(pool, len(episodes))


def test_episode_returns_start_and_replies_in_turn(shared_pool: EnvironmentPool):
    assert begun(shared_pool, 1)[1] == Played(1, 0, Start(({"role": "user", "content": "hello 1"},)))
    for turn, answer in enumerate(("a", "bcd"), start=1):
        shared_pool.step(1, turn, answer)
        message = {"role": "user", "content": answer}
        expected = Reply((message,), reward=turn, metrics={"length": len(answer)})
        assert results(shared_pool, 1)[1] == Played(1, turn, expected)
    shared_pool.end(1)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("raise", "RuntimeError: broken"),
        ("exit", "SystemExit: 1"),
        ("empty", "step returned a Reply without messages; add one, or set done=True"),
        ("number", "reward is nan, not a finite number"),
        ("wrong", "step returned 'text'; return a Reply"),
    ],
)
def test_failed_turn_ends_its_episode_only(shared_pool: EnvironmentPool, answer: str, reason: str):
    begun(shared_pool, 10, 11)
    shared_pool.step(10, 1, answer)
    shared_pool.step(11, 1, "fine")
    played = results(shared_pool, 2)
    assert isinstance(played[10].result, Failure)
    assert played[10].result.reason == reason
    assert isinstance(played[11].result, Reply)
    shared_pool.step(10, 2, "late")  # the episode is gone; nothing answers
    shared_pool.end(11)
    assert not shared_pool.take(0.2)


def test_failure_names_the_line_of_the_environment(shared_pool: EnvironmentPool):
    failure = begun(shared_pool, 20, fails=True)[20].result
    assert isinstance(failure, Failure)
    assert failure.reason == "ValueError: no such level"
    assert "played_environments.py" in failure.traceback
    assert "worker.py" not in failure.traceback


def test_episodes_of_a_process_run_at_the_same_time(shared_pool: EnvironmentPool):
    episodes = range(100, 132)
    begun(shared_pool, *episodes)
    before = shared_pool.busy_seconds
    start = time.monotonic()
    for episode in episodes:
        shared_pool.step(episode, 1, "sleep 0.5")
    results(shared_pool, len(episodes))
    # one after another they would need at least 16 s
    assert time.monotonic() - start < shared_pool.busy_seconds - before
    for episode in episodes:
        shared_pool.end(episode)


def test_lost_process_fails_its_episodes_and_is_replaced():
    with EnvironmentPool(ECHO, 1, 8, 30.0, "custom_envs.echo") as pool:
        begun(pool, 1, 2)
        pool.step(1, 1, "die")
        played = results(pool, 2)
        assert all(isinstance(one.result, Failure) for one in played.values())
        assert {one.result.reason for one in played.values() if isinstance(one.result, Failure)} == {
            "its worker process died (exit code 3)"
        }
        assert isinstance(begun(pool, 3)[3].result, Start)


def test_late_turn_fails_and_retires_its_process():
    with EnvironmentPool(ECHO, 1, 8, 0.5, "custom_envs.echo") as pool:
        begun(pool, 1)
        (old,) = pool.pids
        pool.step(1, 1, "sleep 30")
        assert results(pool, 1)[1].result == Failure("timeout after 0.5 s")
        assert isinstance(begun(pool, 2)[2].result, Start)
        assert old not in pool.pids


def test_episodes_wait_for_room():
    with EnvironmentPool(ECHO, 1, 1, 30.0, "custom_envs.echo") as pool:
        pool.start(1, {"text": "a"}, 0)
        pool.start(2, {"text": "b"}, 0)
        assert set(results(pool, 1)) == {1}
        assert not pool.take(0.3)
        pool.end(1)
        assert set(results(pool, 1)) == {2}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("played_environments.Echo", {"prefx": "x"}, "unexpected keyword argument 'prefx'"),
        ("played_environments.Unfinished", {}, "the class lacks step; define these methods"),
        ("played_environments.function", {}, "is no subclass of roll_gspo.environments.Environment"),
        ("played_environments.Missing", {}, "has no 'Missing'"),
    ],
)
def test_wrong_environment_is_refused(name: str, arguments: dict[str, Any], message: str):
    with EnvironmentPool(EnvironmentSpec(name, arguments), 1, 1, 5.0, "custom_envs.mine") as pool:
        pool.start(1, {}, 0)
        with pytest.raises(ConfigError, match=f"custom_envs.mine: .*{message}"):
            pool.take(WAIT_S)


def test_another_interpreter_has_its_packages_and_the_modules_of_the_user(tmp_path: Path):
    venv.create(tmp_path / "other", symlinks=True)
    python = str(tmp_path / "other/bin/python")
    for interpreter, prefix, has_numpy in ((python, tmp_path / "other", False), (None, Path(sys.prefix), True)):
        spec = EnvironmentSpec("played_environments.Installation", python=interpreter)
        with EnvironmentPool(spec, 1, 1, 30.0, "custom_envs.mine") as pool:
            assert begun(pool, 1, package="numpy")[1].result == Start(
                ({"role": "user", "content": f"{prefix} {has_numpy}"},)
            )


def test_missing_interpreter_is_an_error():
    with EnvironmentPool(replace(ECHO, python="/nowhere/python"), 1, 1, 30.0, "custom_envs.mine") as pool:
        pool.start(1, {}, 0)
        with pytest.raises(PlayError, match=r"custom_envs.mine: .*/nowhere/python cannot be executed: No such file"):
            pool.take(WAIT_S)


def test_processes_end_with_the_pool():
    with EnvironmentPool(ECHO, 2, 1, 30.0, "custom_envs.echo") as pool:
        begun(pool, 1, 2)
        pids = pool.pids
        assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
