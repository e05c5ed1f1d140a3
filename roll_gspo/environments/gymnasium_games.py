"""`gymnasium`: environments of Gymnasium whose actions are texts or numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium import spaces

from roll_gspo.environments.base import Environment, Message, Reply, Start
from roll_gspo.errors import ConfigError
from roll_gspo.registry import import_target

RENDER = "render"


class GymnasiumEnvironment(Environment):
    """An episode of `gymnasium.make(env_id, **make)`.

    The seed of the row is the seed of `reset`, and a column `options` of the row is its `options`. An episode ends if
    Gymnasium terminates or truncates it. An answer that is no action changes nothing.

    Args:
        env_id: id of the environment, e.g. `FrozenLake-v1`, or `my_module:MyGame-v0` to import what registers it.
        make: further arguments of `gymnasium.make`.
        actions: names of discrete actions, in order; None: their numbers. Upper and lower case are the same.
        action_pattern: regular expression of an answer, whose last group is the action; None: the whole answer.
        observation: None: `str` of the observation. `render`: the text that `render` returns. Or the dotted path of a
            function of the observation and of `info`.
        instruction: text before the first observation.
    """

    def __init__(
        self,
        env_id: str,
        make: Mapping[str, Any] | None = None,
        actions: Sequence[str] | None = None,
        action_pattern: str | None = None,
        observation: str | None = None,
        instruction: str = "",
    ) -> None:
        # Without the checks that Gymnasium prints warnings with; a wrong action is a turn that counts as invalid.
        options: dict[str, Any] = {"disable_env_checker": True} | (
            {"render_mode": "ansi"} if observation == RENDER else {}
        )
        self._env: gymnasium.Env[Any, Any] = gymnasium.make(env_id, **(options | dict(make or {})))
        self._parse = _parser(self._env.action_space, actions, env_id)
        self._pattern = re.compile(action_pattern, re.DOTALL) if action_pattern is not None else None
        self._show = self._shower(observation)
        self._instruction = instruction

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        observation, info = self._env.reset(seed=seed, options=row.get("options"))
        text = self._show(observation, info)
        return Start((_user(f"{self._instruction}\n\n{text}" if self._instruction else text),))

    def step(self, answer: str) -> Reply:
        action = self._action_of(answer)
        if action is None:
            return Reply((_user(f"{answer.strip()[:80]!r} is no action."),), invalid=True)
        observation, reward, terminated, truncated, info = self._env.step(action)
        done = terminated or truncated
        messages = () if done else (_user(self._show(observation, info)),)
        return Reply(messages, float(reward), done, {"truncated": float(truncated)} if done else {})

    def close(self) -> None:
        self._env.close()

    def _action_of(self, answer: str) -> Any:
        if self._pattern is not None:
            found = self._pattern.search(answer)
            if found is None:
                return None
            answer = found.groups()[-1] if found.groups() else found[0]
        return self._parse(answer.strip())

    def _shower(self, observation: str | None) -> Callable[[Any, Mapping[str, Any]], str]:
        if observation is None:
            return lambda seen, _: str(seen)
        if observation == RENDER:
            return lambda _, __: str(self._env.render())
        return import_target(observation, "env_config.observation")


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _parser(space: Any, actions: Sequence[str] | None, env_id: str) -> Callable[[str], Any]:
    """Return a function from the text of an action to the action, or None.

    Raises:
        ConfigError: the actions are neither texts nor numbers, or their names do not fit.
    """
    if isinstance(space, spaces.Text) and actions is None:
        return lambda text: text if space.contains(text) else None
    if not isinstance(space, spaces.Discrete):
        wanted = "" if actions is None else "; `actions` are names of a Discrete space"
        raise ConfigError(
            f"env_config.env_id: the actions of {env_id} are {space}{wanted}; use an environment whose action space is "
            "Text or Discrete, or wrap it"
        )
    first, count = int(space.start), int(space.n)
    names = list(actions) if actions is not None else [str(first + number) for number in range(count)]
    if len(names) != count:
        raise ConfigError(f"env_config.actions: {len(names)} names for the {count} actions of {env_id}; name all")
    numbers = {name.lower(): first + place for place, name in enumerate(names)}
    return lambda text: numbers.get(text.lower())
