"""Environments of Gymnasium: texts, named actions, the toy texts that Gymnasium ships, and wrong options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

gymnasium = pytest.importorskip("gymnasium", reason="pip install 'roll-gspo[gymnasium]'")

from roll_gspo.environments import Reply, Start  # noqa: E402
from roll_gspo.environments.gymnasium_games import GymnasiumEnvironment  # noqa: E402
from roll_gspo.environments.pool import EnvironmentPool, Failure, Played  # noqa: E402
from roll_gspo.environments.spec import EnvironmentSpec, environment_factory  # noqa: E402
from roll_gspo.errors import ConfigError  # noqa: E402

LAKE = {
    "env_id": "FrozenLake-v1",
    "make": {"desc": ["SFG", "HFF"], "is_slippery": False},
    "actions": ["Left", "Down", "Right", "Up"],
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])


def begun(options: dict[str, Any], row: dict[str, Any] | None = None, seed: int = 3) -> tuple[Any, str]:
    """Begin an episode; return the environment and the first prompt."""
    game = environment_factory(EnvironmentSpec("gymnasium", options))()
    start = game.reset(row or {}, seed)
    return game, start.messages[0]["content"]


def test_text_environment_gets_answers_and_ends_by_truncation():
    game, prompt = begun({"env_id": "gymnasium_echo:Echo-v0", "instruction": "Repeat the word."}, seed=1)
    word = prompt.removeprefix("Repeat the word.\n\n")
    assert prompt == begun({"env_id": "gymnasium_echo:Echo-v0", "instruction": "Repeat the word."}, seed=1)[1]
    assert game.step(f" {word}\n") == Reply(({"role": "user", "content": word},), reward=1.0)
    assert game.step("longer than the space").invalid  # the environment does not see it
    assert game.step("hello").reward == 0.0
    assert game.step(word) == Reply((), reward=1.0, done=True, metrics={"truncated": 1.0})
    game.close()


def test_rows_have_options_and_functions_show_observations():
    options = {"env_id": "gymnasium_echo:Echo-v0", "observation": "gymnasium_echo.shown", "action_pattern": r"\[(.*)\]"}
    game, prompt = begun(options, {"options": {"word": "owl"}})
    assert prompt == "repeat: owl"
    assert game.step("I say [owl]") == Reply(({"role": "user", "content": "again: owl"},), reward=1.0)
    assert game.step("owl").messages[0]["content"] == "'owl' is no action."
    assert game.step("[bye]") == Reply((), reward=0.0, done=True, metrics={"truncated": 0.0})


def test_frozen_lake_of_gymnasium_has_named_actions_and_is_rendered():
    game, prompt = begun({**LAKE, "observation": "render"})
    assert prompt.split() == ["\x1b[41mS\x1b[0mFG", "HFF"]
    assert game.step("right").messages[0]["content"].split()[0] == "(Right)"
    assert game.step("RIGHT") == Reply((), reward=1.0, done=True, metrics={"truncated": 0.0})


def test_numbers_are_actions_without_names():
    game, prompt = begun({"env_id": "Blackjack-v1"})
    player, dealer, ace = prompt.strip("()").split(", ")
    assert 4 <= int(player) <= 21 and 1 <= int(dealer) <= 10 and ace in ("0", "1")
    assert game.step("hit").invalid
    stick = game.step("0")
    assert stick.done and stick.reward in (-1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**LAKE, "actions": ["Left", "Right"]}, "env_config.actions: 2 names for the 4 actions of FrozenLake-v1"),
        ({"env_id": "gymnasium_echo:Wide-v0"}, r"env_config.env_id: the actions of gymnasium_echo:Wide-v0 are Box"),
        ({"env_id": "gymnasium_echo:Echo-v0", "actions": ["a"]}, "`actions` are names of a Discrete space"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        GymnasiumEnvironment(**options)


@pytest.fixture
def pool() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(EnvironmentSpec("gymnasium", LAKE), 1, 4, 30.0, "custom_envs.lake") as pool:
        yield pool


def test_pool_plays_it_in_worker_processes(pool: EnvironmentPool):
    def result() -> Played:
        (played,) = pool.take(60.0)
        return played

    pool.start(1, {}, 3)
    assert result() == Played(1, 0, Start(({"role": "user", "content": "0"},)))
    pool.step(1, 1, "right")
    assert result() == Played(1, 1, Reply(({"role": "user", "content": "1"},)))
    pool.step(1, 2, "right")
    assert result() == Played(1, 2, Reply(reward=1.0, done=True, metrics={"truncated": 0.0}))
    pool.start(2, {"options": 3}, -1)  # Gymnasium refuses negative seeds
    failure = result().result
    assert isinstance(failure, Failure) and "actual value: -1" in failure.reason
