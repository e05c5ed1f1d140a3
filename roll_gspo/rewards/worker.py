"""Program of a worker process, which computes rewards. It does not import torch.

The worker receives the pickled `(RewardSpec, max_memory_mb)`, then pickled `(timeout_s, requests)` messages. It sends
JSON: `{"batch": bool}` once the reward is built, or `{"error": [class, text]}`; then the fields of one `RewardResult`
per request.

Each result is sent before the next request is scored, so that the pool knows on which sample a process hung or died.
A `BatchReward` sends all results of a batch at its end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

from roll_gspo.rewards.base import BatchReward, RewardOutput, RewardRequest, RewardResult
from roll_gspo.rewards.spec import build_reward
from roll_gspo.workers import pipe
from roll_gspo.workers.child import limit_memory, message_of, serve

_EXIT_GRACE_S = 5.0
_MAX_FAILURE_CHARS = 500
_MAX_FRAMES, _MAX_TRACEBACK_CHARS = 10, 3000
_OWN_FOLDER = Path(__file__).parent
_MAX_FLOAT32 = 3.4028234663852886e38


def main(descriptor: int, parent_pid: int) -> None:
    """Score requests until the pool closes the connection or its process ends; see `workers.child.serve`."""
    serve(descriptor, parent_pid, _serve)


def _serve(connection: socket.socket) -> None:
    spec, max_memory_mb = pickle.loads(pipe.receive(connection))
    limit_memory(max_memory_mb)
    try:
        reward = build_reward(spec)
    except BaseException as error:
        _send(connection, {"error": [type(error).__name__, message_of(error)]})
        return
    _send(connection, {"batch": isinstance(reward, BatchReward)})
    with open(os.devnull, "w") as devnull:
        while True:
            timeout_s, requests = pickle.loads(pipe.receive(connection))
            if isinstance(reward, BatchReward):
                with _exit_after(timeout_s * len(requests), devnull):
                    results = evaluate_batch(reward, requests)
                for result in results:
                    _send(connection, vars(result))
                continue
            for request in requests:
                with _exit_after(timeout_s, devnull):
                    result = evaluate(reward, request)
                _send(connection, vars(result))


@contextlib.contextmanager
def _exit_after(seconds: float, devnull: Any) -> Iterator[None]:
    """Exit the process if the block takes `seconds` plus a grace period.

    The pool kills a worker that hangs. If the pool has ended too and C code holds the GIL, no Python thread can end
    this process, but the watchdog of faulthandler can.
    """
    faulthandler.dump_traceback_later(seconds + _EXIT_GRACE_S, exit=True, file=devnull)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _send(connection: socket.socket, message: object) -> None:
    pipe.send(connection, json.dumps(message).encode())


def evaluate(reward: Callable[[RewardRequest], Any], request: RewardRequest) -> RewardResult:
    """Score one request; an exception or an invalid return value becomes a failed result."""
    try:
        return _to_result(reward(request))
    except BaseException as error:  # including SystemExit: the process keeps serving
        return _failed_result(error)


def evaluate_batch(reward: BatchReward, requests: Sequence[RewardRequest]) -> list[RewardResult]:
    """Score a batch; if the reward raises, score each request alone, so that only those that raise again fail."""
    try:
        values = list(reward.score_batch(requests))
    except BaseException as error:
        if len(requests) == 1:
            return [_failed_result(error)]
        return [result for request in requests for result in evaluate_batch(reward, [request])]
    if len(values) != len(requests):
        wrong = _InvalidOutputError(f"returned {len(values)} scores for {len(requests)} requests")
        return [_failed_result(wrong) for _ in requests]
    return [evaluate(lambda _, value=value: value, request) for value, request in zip(values, requests, strict=True)]


class _InvalidOutputError(Exception):
    """A reward returned something that is neither a valid number nor a valid `RewardOutput`."""


def _to_result(value: object) -> RewardResult:
    output = value if isinstance(value, RewardOutput) else RewardOutput(value)  # pyright: ignore[reportArgumentType]
    score = _number(output.score)
    components = {str(name): _number(component) for name, component in output.components.items()}
    return RewardResult(score, None, _answer(output.answer), components)


def _failed_result(error: BaseException) -> RewardResult:
    text = message_of(error)
    if isinstance(error, MemoryError) and not text:
        text = "out of memory"
    reason = text if isinstance(error, _InvalidOutputError) else f"{type(error).__name__}: {text}"
    short = reason if len(reason) <= _MAX_FAILURE_CHARS else reason[:_MAX_FAILURE_CHARS] + "..."
    return RewardResult(0.0, short, traceback=_traceback_of(error))


def _traceback_of(error: BaseException) -> str:
    """Return the last frames of the reward's own code, innermost last."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent != _OWN_FOLDER]
    return "".join(traceback.format_list(frames[-_MAX_FRAMES:]))[-_MAX_TRACEBACK_CHARS:]


def _answer(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise _InvalidOutputError(f"returned the answer {value!r}, not a string")
    return value


def _number(value: object) -> float:
    if not isinstance(value, SupportsFloat):
        raise _InvalidOutputError(f"returned {value!r}, not a number")
    if not math.isfinite(number := float(value)):
        raise _InvalidOutputError(f"returned {number}, not a finite number")
    if abs(number) > _MAX_FLOAT32:
        raise _InvalidOutputError(f"returned {number}, which exceeds float32, the dtype of rewards in training")
    return number
