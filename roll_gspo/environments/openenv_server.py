"""`openenv`: environments of OpenEnv servers, over the WebSocket of its client."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, TypeVar

from openenv.core import GenericEnvClient  # pyright: ignore[reportMissingImports]
from openenv.core.client_types import StepResult  # pyright: ignore[reportMissingImports]

from roll_gspo.environments.base import Environment, Message, Reply, Start
from roll_gspo.errors import ConfigError
from roll_gspo.registry import import_target, is_dotted_path
from roll_gspo.workers.event_loop import submit

_INVALID = "(code: VALIDATION_ERROR)"
_HIDDEN = ("done", "reward", "metadata")
_CONNECT_TIMEOUT_S = 10.0
T = TypeVar("T")


class OpenEnv(Environment):
    """An episode in a session of an OpenEnv server, which must allow as many sessions as episodes.

    `reset` gets the seed of the row, and the entries of its column `options` if it has one. An action that the server's
    schema rejects is a turn that cannot be understood.

    Args:
        base_url: address of the server, e.g. `http://127.0.0.1:8000`.
        action: field of the action that takes the text, or the dotted path of a function from the text to the action,
            a dictionary; None stands for a text that is no action.
        action_pattern: regular expression of an answer, whose last group is the text of the action; None: all of it.
        observation: field of the observation, or the dotted path of a function from the observation, a dictionary, to
            its text; None: all its fields as JSON.
        instruction: text before the first observation.
        headers: HTTP headers of the connection.
        timeout_s: seconds per answer of the server.
    """

    def __init__(
        self,
        base_url: str,
        action: str,
        action_pattern: str | None = None,
        observation: str | None = None,
        instruction: str = "",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._action = _action_function(action)
        self._pattern = re.compile(action_pattern, re.DOTALL) if action_pattern is not None else None
        self._show = _observation_function(observation)
        self._instruction = instruction
        self._timeout_s = timeout_s
        self._client = GenericEnvClient(
            base_url=base_url, message_timeout_s=timeout_s, headers=dict(headers) if headers is not None else None
        )

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        options = row.get("options") or {}
        result: StepResult[dict[str, Any]] = self._run(lambda: self._client.reset(seed=seed, **options))
        text = self._show(result.observation)
        return Start((_user(f"{self._instruction}\n\n{text}" if self._instruction else text),))

    def step(self, answer: str) -> Reply:
        action = self._action_of(answer)
        if action is None:
            return Reply((_user(f"{answer.strip()[:80]!r} is no action."),), invalid=True)
        try:
            result: StepResult[dict[str, Any]] = self._run(lambda: self._client.step(action))
        except RuntimeError as error:  # what the client raises if the server reports an error
            if _INVALID not in str(error):
                raise
            return Reply((_user(str(error)),), invalid=True)
        messages = () if result.done else (_user(self._show(result.observation)),)
        return Reply(messages, float(result.reward or 0.0), result.done)

    def close(self) -> None:
        with suppress(Exception):  # the server may be gone
            self._run(self._client.close)

    def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        async def called() -> T:
            return await call()

        future = submit(called())
        try:
            return future.result(self._timeout_s + _CONNECT_TIMEOUT_S)
        except FutureTimeoutError:
            future.cancel()
            raise

    def _action_of(self, answer: str) -> Mapping[str, Any] | None:
        if self._pattern is not None:
            found = self._pattern.search(answer)
            if found is None:
                return None
            answer = found.groups()[-1] if found.groups() else found[0]
        return self._action(answer.strip())


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _action_function(action: str) -> Callable[[str], Mapping[str, Any] | None]:
    if is_dotted_path(action):
        return import_target(action, "env_config.action")
    return lambda text: {action: text}


def _observation_function(observation: str | None) -> Callable[[Mapping[str, Any]], str]:
    if observation is None:
        return lambda seen: json.dumps({key: value for key, value in seen.items() if key not in _HIDDEN})
    if is_dotted_path(observation):
        return import_target(observation, "env_config.observation")

    def field(seen: Mapping[str, Any]) -> str:
        if observation not in seen:
            raise ConfigError(
                f"env_config.observation: the server's observation has no {observation} ({', '.join(seen)}); use "
                "one of its fields, or a function"
            )
        return str(seen[observation])

    return field
