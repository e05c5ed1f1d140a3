"""Program of a worker process, which plays episodes. It does not import torch.

The worker receives the pickled `Setup`, then pickled `Command`s. It sends JSON: `{"threads": n}` once the environment
can be built, or `{"error": [class, text]}`; then one `{"episode": ..., "turn": ..., ...}` per command, in any order.
Commands of different episodes run at the same time, each in its own thread.
"""

from __future__ import annotations

import json
import math
import pickle
import socket
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from roll_gspo.environments.base import Environment, Reply, Start
from roll_gspo.environments.spec import EnvironmentSpec, environment_factory
from roll_gspo.workers import pipe
from roll_gspo.workers.child import limit_memory, message_of, serve

_OWN_FOLDER = Path(__file__).parent
_MAX_FAILURE_CHARS, _MAX_FRAMES, _MAX_TRACEBACK_CHARS = 500, 10, 3000


class Setup(NamedTuple):
    """First message to a worker: the environment, and how many episodes it plays at the same time."""

    spec: EnvironmentSpec
    max_memory_mb: int | None
    num_threads: int


class Command(NamedTuple):
    """A message to a worker.

    Attributes:
        episode: number of the episode.
        turn: number of the answer of the model, from 1; 0 begins the episode, -1 ends it.
        row: columns of the data row, with `turn` 0.
        seed: seed of the row, with `turn` 0.
        answer: text of the model's turn.
    """

    episode: int
    turn: int
    row: Mapping[str, Any] | None = None
    seed: int = 0
    answer: str = ""


class InvalidReplyError(Exception):
    """An environment returned something that is no valid `Start` or `Reply`."""


def main(descriptor: int, parent_pid: int) -> None:
    """Play episodes until the pool closes the connection or its process ends; see `workers.child.serve`."""
    serve(descriptor, parent_pid, _serve)


def _serve(connection: socket.socket) -> None:
    setup: Setup = pickle.loads(pipe.receive(connection))
    limit_memory(setup.max_memory_mb)
    sending = threading.Lock()

    def send(message: object) -> None:
        with sending:
            pipe.send(connection, json.dumps(message).encode())

    try:
        make = environment_factory(setup.spec)
    except BaseException as error:
        send({"error": [type(error).__name__, message_of(error)]})
        return
    send({"threads": setup.num_threads})
    episodes: dict[int, Environment] = {}

    def run(command: Command) -> None:
        send({"episode": command.episode, "turn": command.turn, **_answered(command)})

    def _answered(command: Command) -> dict[str, Any]:
        try:
            if command.turn == 0:
                episodes[command.episode] = make()
                return _start_message(episodes[command.episode].reset(command.row or {}, command.seed))
            if command.turn < 0:
                episodes.pop(command.episode).close()
                return {}
            return _reply_message(episodes[command.episode].step(command.answer))
        except BaseException as error:  # including SystemExit: the process keeps playing other episodes
            return _failure_message(error)

    with ThreadPoolExecutor(setup.num_threads) as threads:
        while True:
            threads.submit(run, pickle.loads(pipe.receive(connection)))


def _start_message(start: object) -> dict[str, Any]:
    if not isinstance(start, Start):
        raise InvalidReplyError(f"reset returned {start!r}; return a Start")
    return {"start": {"messages": _messages(start.messages), "tools": [dict(tool) for tool in start.tools]}}


def _reply_message(reply: object) -> dict[str, Any]:
    if not isinstance(reply, Reply):
        raise InvalidReplyError(f"step returned {reply!r}; return a Reply")
    messages = _messages(reply.messages)
    if not (messages or reply.done):
        raise InvalidReplyError("step returned a Reply without messages; add one, or set done=True")
    return {
        "reply": {
            "messages": messages,
            "reward": _number(reply.reward, "reward"),
            "done": bool(reply.done),
            "metrics": {str(name): _number(value, f"metrics[{name!r}]") for name, value in reply.metrics.items()},
            "invalid": bool(reply.invalid),
        }
    }


def _messages(messages: object) -> list[dict[str, Any]]:
    found: list[Any] = list(messages) if isinstance(messages, tuple | list) else [messages]
    for message in found:
        if not (isinstance(message, Mapping) and {"role", "content"} <= message.keys()):
            raise InvalidReplyError(f"messages contain {message!r}; write {{role, content}}")
    return [dict(message) for message in found]


def _number(value: object, name: str) -> float:
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise InvalidReplyError(f"{name} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise InvalidReplyError(f"{name} is {number}, not a finite number")
    return number


def _failure_message(error: BaseException) -> dict[str, Any]:
    text = message_of(error)
    reason = text if isinstance(error, InvalidReplyError) else f"{type(error).__name__}: {text}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent != _OWN_FOLDER]
    trace = "".join(traceback.format_list(frames[-_MAX_FRAMES:]))[-_MAX_TRACEBACK_CHARS:]
    return {"failed": reason[:_MAX_FAILURE_CHARS], "traceback": trace}
