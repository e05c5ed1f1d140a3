"""`verifiers`: tasksets of verifiers (v1), played by a harness of it.

The harness asks an endpoint on the loopback device for every answer. An episode turns each request into a prompt and
the model's answer into the response, so that the tokens are those of the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
from verifiers.v1.configs.agent import agent_config_fields  # pyright: ignore[reportMissingImports]

from roll_gspo.environments.base import Environment, Reply, Start
from roll_gspo.environments.chat_endpoint import ChatEndpoint, ChatRequest, Conversation
from roll_gspo.errors import ConfigError, DataError, PlayError
from roll_gspo.registry import did_you_mean
from roll_gspo.tools.calls import FORMATS, CallFormat
from roll_gspo.workers.event_loop import event_loop, submit

_KEY_VARIABLE = "ROLL_GSPO_NO_API_KEY"


class VerifiersTasks:
    """A taskset and its harness, which the episodes of a process share."""

    def __init__(
        self, config: vf.EnvConfig, select: Mapping[str, Any], call_format: CallFormat, start_timeout_s: float
    ) -> None:
        self.environment = vf.load_environment(config)
        seats = [*agent_config_fields(config)]
        if len(seats) != 1:
            raise ConfigError(
                f"env_config.taskset: the environment has the agents {', '.join(seats)}, but one model is trained; use "
                "a taskset for one agent"
            )
        view = self.environment.taskset.select(vf.SelectConfig.model_validate(dict(select)))
        if not view.bounded:
            raise ConfigError("env_config.select: the taskset is infinite; set limit to the number of tasks")
        self.tasks = list(view)
        if not self.tasks:
            raise ConfigError("env_config.select: no task is left; select some")
        self.call_format = call_format
        self.endpoint = ChatEndpoint()
        self._numbers = itertools.count()
        started: Future[None] = Future()
        self._serving = submit(self._serve(started))
        started.result(start_timeout_s)

    def begin(self, number: int) -> tuple[str, Conversation, Future[None]]:
        """Begin an episode of a task; return the key of its conversation, the conversation, and its end."""
        key = f"episode-{next(self._numbers)}"
        conversation = Conversation(self.call_format)
        self.endpoint.conversations[key] = conversation
        return key, conversation, submit(self._play(key, self.tasks[number % len(self.tasks)], conversation))

    async def _serve(self, started: Future[None]) -> None:
        try:
            await self.endpoint.start()
            async with self.environment.serving():
                started.set_result(None)
                await asyncio.Event().wait()
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _play(self, key: str, task: vf.Task, conversation: Conversation) -> None:
        client = vf.EvalClientConfig(base_url=self.endpoint.url, api_key_var=_KEY_VARIABLE)
        try:
            episode = await self.environment.run_episode(task, vf.ModelContext(model=key, client=client))
            conversation.events.put(episode)
        except Exception as error:
            conversation.events.put(error)
        finally:
            del self.endpoint.conversations[key]


class Verifiers(Environment):
    """An episode of a task of verifiers. The reward of its last turn is the reward of the trace.

    Seeds go through the selected tasks in order. A column `task` of the row names another one by its number.
    """

    def __init__(self, tasks: VerifiersTasks) -> None:
        self._tasks = tasks
        self._request: ChatRequest | None = None
        self._conversation: Conversation | None = None
        self._run: Future[None] | None = None

    @classmethod
    def factory(
        cls,
        taskset: str | Mapping[str, Any],
        agent: Mapping[str, Any] | None = None,
        select: Mapping[str, Any] | None = None,
        format: str = "hermes",
        start_timeout_s: float = 300.0,
    ) -> Callable[[], Environment]:
        """Load the taskset and start the servers of a process.

        Args:
            taskset: id of a taskset, which is an installed package or an importable module, or a block with `id` and
                its configuration.
            agent: configuration of the agent. The harness is `null` (a chat with the task's tools) if the taskset
                brings none, and the runtime is `subprocess`. Sampling and model are those of the run.
            select: tasks to use: `include`, `exclude`, `shuffle`, `seed`, `skip`, `limit`.
            format: format of calls of tools: `hermes` (Qwen), `llama3` or `mistral`.
            start_timeout_s: seconds for the start of the servers.

        Raises:
            ConfigError: the taskset has several agents, is infinite, or the format is unknown.
        """
        if format not in FORMATS:
            hint = did_you_mean(format, list(FORMATS))
            raise ConfigError(f"env_config.format: unknown format '{format}'{hint}; use one of {', '.join(FORMATS)}")
        block = {"id": taskset} if isinstance(taskset, str) else dict(taskset)
        seat = {"runtime": {"type": "subprocess"}, **(agent or {})}
        if vf.default_harness_id(block["id"]) == "bash":  # the default of verifiers runs commands on this machine
            seat = {"harness": {"id": "null"}, **seat}
        config = vf.resolve_env_config({"taskset": block, "agent": seat})
        tasks = VerifiersTasks(config, select or {}, FORMATS[format], start_timeout_s)
        return lambda: cls(tasks)

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        number = row.get("task", seed // 2)  # seeds of training are even, and those of validation odd
        if not isinstance(number, int):
            raise DataError(f"row {row.get('id', '?')}: the column task is {number!r}; write the number of a task")
        _, self._conversation, self._run = self._tasks.begin(number)
        event = self._conversation.events.get()
        if not isinstance(event, ChatRequest):
            raise _failure(event, "the harness ended without a request to the model")
        self._request = event
        return Start(event.messages, event.tools)

    def step(self, answer: str) -> Reply:
        assert self._request is not None and self._conversation is not None
        pending = self._request.answer
        event_loop().call_soon_threadsafe(lambda: pending.done() or pending.set_result(answer))
        event = self._conversation.events.get()
        if isinstance(event, ChatRequest):
            self._request = event
            return Reply(event.messages)
        if not (isinstance(event, vf.Episode) and event.ok):
            raise _failure(event, "the episode failed")
        trace = event.traces[-1]
        metrics = {name: value for name, value in trace.metrics.items() if value is not None and math.isfinite(value)}
        return Reply(reward=trace.reward, done=True, metrics=metrics)

    def close(self) -> None:
        if self._run is not None:
            self._run.cancel()


def _failure(event: Any, otherwise: str) -> Exception:
    """Return the exception of an episode that failed: one that was raised, or those that the episode recorded."""
    if isinstance(event, Exception):
        return event
    errors = [*event.errors, *(error for trace in event.traces for error in trace.errors)]
    return PlayError("; ".join(f"{error.type}: {error.message}" for error in errors) or otherwise)
