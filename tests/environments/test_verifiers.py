"""Tasksets of the real verifiers. The package has a virtual environment, because it conflicts with vLLM's packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from package_venvs import python_with

from roll_gspo.environments import Reply, Start
from roll_gspo.environments.pool import EnvironmentPool, Failure
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.errors import ConfigError

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # downloads packages
WORDS = {"id": "verifiers_words", "suffix": " now"}
CALL = '<tool_call>{"name": "letter", "arguments": {"place": 1}}</tool_call>'


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return python_with("verifiers", tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def words(python: str, importable: None) -> Iterator[EnvironmentPool]:
    with pool_of(python, taskset=WORDS, agent={"max_turns": 3}) as pool:
        yield pool


def pool_of(python: str, **options: Any) -> EnvironmentPool:
    return EnvironmentPool(EnvironmentSpec("verifiers", options, python), 1, 8, 120.0, "custom_envs.words", 300.0)


def result(pool: EnvironmentPool) -> Any:
    (played,) = pool.take(120.0)
    return played.result


def results(pool: EnvironmentPool, count: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(240):
        found += pool.take(0.5)
        if len(found) == count:
            break
    return found


def asked(word: str) -> tuple[dict[str, str], ...]:
    return ({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Spell {word} now."})


def test_seed_selects_the_task_and_its_reward_scores_the_answer(words: EnvironmentPool):
    words.start(1, {}, seed=8)
    start = result(words)
    assert start.messages == asked("bee")
    assert [tool["function"]["name"] for tool in start.tools] == ["letter"]
    words.step(1, 1, "bee")
    assert result(words) == Reply(reward=2.0, done=True, metrics={"length": 3.0})
    words.end(1)


def test_calls_are_answered_by_the_harness(words: EnvironmentPool):
    words.start(2, {"task": 2}, seed=0)
    assert result(words).messages == asked("cow")
    words.step(2, 1, f"The second letter? {CALL}")
    assert result(words) == Reply(({"role": "tool", "tool_call_id": "call_0", "content": "o"},))
    words.step(2, 2, "cat")
    assert result(words) == Reply(reward=0.0, done=True, metrics={"length": 3.0})
    words.end(2)


def test_limit_of_the_agent_ends_and_scores_the_episode(words: EnvironmentPool):
    words.start(3, {"task": 0}, seed=0)
    result(words)
    for turn in (1, 2):
        words.step(3, turn, CALL)
        assert result(words).messages[0]["content"] == "n"
    words.step(3, 3, CALL)
    assert result(words).done
    words.end(3)


def test_many_episodes_do_not_mix(words: EnvironmentPool):
    for number in range(20, 26):
        words.start(number, {"task": number}, seed=0)
    assert all(len(played.result.messages) == 2 for played in results(words, 6))
    for number in range(20, 26):
        words.step(number, 1, "bee")
    rewards = {played.episode: played.result.reward for played in results(words, 6)}
    assert rewards == {20: 0.0, 21: 0.0, 22: 2.0, 23: 0.0, 24: 0.0, 25: 2.0}
    for number in range(20, 26):
        words.end(number)


def test_exception_of_a_reward_is_a_failure(words: EnvironmentPool):
    words.start(4, {}, seed=0)
    result(words)
    words.step(4, 1, "crash")
    failure = result(words)
    assert isinstance(failure, Failure) and "cannot score this" in failure.reason


def test_abandoned_episode_ends(words: EnvironmentPool):
    words.start(5, {}, seed=0)
    assert isinstance(result(words), Start)
    words.end(5)
    words.start(6, {}, seed=0)
    assert isinstance(result(words), Start)
    words.end(6)


def test_rewritten_history_is_a_failure(python: str):
    with pool_of(python, taskset=WORDS, agent={"harness": {"id": "verifiers_words", "rewrites": True}}) as pool:
        pool.start(1, {}, seed=0)
        result(pool)
        pool.step(1, 1, CALL)
        failure = result(pool)
        assert isinstance(failure, Failure) and "does not continue the conversation" in failure.reason


def test_environment_talks_with_the_chat_harness_of_verifiers(python: str):
    """The harness `null` is a program that uv installs, and it streams."""
    with pool_of(python, taskset="verifiers_talk", select={"limit": 2}) as pool:
        pool.start(1, {}, seed=0)
        assert result(pool) == Start(({"role": "user", "content": "Guess a number."},))
        pool.step(1, 1, "5")
        assert result(pool) == Reply(({"role": "user", "content": "more"},))
        pool.step(1, 2, "7")
        assert result(pool) == Reply(reward=0.5, done=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taskset": "verifiers_talk"}, "the taskset is infinite; set limit"),
        ({"taskset": WORDS, "format": "xml"}, "unknown format 'xml'"),
        ({"taskset": WORDS, "select": {"include": {"idx": [7]}}}, "no task is left"),
    ],
)
def test_wrong_options_stop_the_start(python: str, options: dict[str, Any], message: str):
    with pool_of(python, **options) as pool:
        pool.start(1, {}, seed=0)
        with pytest.raises(ConfigError, match=message):
            pool.take(120.0)
