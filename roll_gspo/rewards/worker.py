"""The process that computes rewards: `main` is its whole life. It imports no torch.

In come the pickled `(RewardSpec, max_memory_mb)`, then pickled `(timeout_s, requests)`. Out go, as JSON, `{"batch":
bool}` once the reward is built or `{"error": [class, text]}`, then the fields of a `RewardResult` for each request.
Each is sent before the next one is started (or, by a `BatchReward`, all once they are done), so that the pool knows
which sample, or batch, a process hung on or died of.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import pickle
import resource
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

from roll_gspo.rewards import pipe
from roll_gspo.rewards.base import BatchReward, RewardRequest, RewardResult, Verdict
from roll_gspo.rewards.catalog import build_reward

_PARENT_CHECK_S = 0.5
_LAST_RESORT_S = 5.0
_MAX_FAILURE_CHARS = 500
_MAX_FLOAT32 = 3.4028234663852886e38


def main(descriptor: int, parent_pid: int) -> None:
    """Serve until the pool closes the connection or its process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    threading.Thread(target=_end_with_parent, args=(parent_pid,), daemon=True).start()
    try:
        _serve(connection)
    except (EOFError, ConnectionError):
        pass  # the pool closed, or its process ended
    except BaseException:
        traceback.print_exc()
    finally:
        _kill_own_group()


def _serve(connection: socket.socket) -> None:
    spec, max_memory_mb = pickle.loads(pipe.receive(connection))
    _limit_memory(max_memory_mb)
    try:
        reward = build_reward(spec)
    except BaseException as error:
        _send(connection, {"error": [type(error).__name__, _text_of(error)]})
        return
    _send(connection, {"batch": isinstance(reward, BatchReward)})
    with open(os.devnull, "w") as nowhere:
        while True:
            timeout_s, requests = pickle.loads(pipe.receive(connection))
            if isinstance(reward, BatchReward):
                with _ended_after(timeout_s * len(requests), nowhere):
                    results = evaluate_batch(reward, requests)
                for result in results:
                    _send(connection, vars(result))
                continue
            for request in requests:
                with _ended_after(timeout_s, nowhere):
                    result = evaluate(reward, request)
                _send(connection, vars(result))


def _limit_memory(max_memory_mb: int | None) -> None:
    """Bound what this process allocates; and where the machine runs out, let the kernel take it, not the training."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if max_memory_mb is not None:  # not the address space, of which libraries map much more than they use
        resource.setrlimit(resource.RLIMIT_DATA, (max_memory_mb << 20, max_memory_mb << 20))


@contextlib.contextmanager
def _ended_after(seconds: float, nowhere: Any) -> Iterator[None]:
    """The pool kills a worker that hangs. Should the pool be gone, too, while this process is stuck in C code that
    holds the GIL, then no Python thread can end it, but faulthandler's can."""
    faulthandler.dump_traceback_later(seconds + _LAST_RESORT_S, exit=True, file=nowhere)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _send(connection: socket.socket, message: object) -> None:
    pipe.send(connection, json.dumps(message).encode())


def evaluate(reward: Callable[[RewardRequest], Any], request: RewardRequest) -> RewardResult:
    """What the reward says of a request, or why it says nothing."""
    try:
        return _result(reward(request))
    except BaseException as error:  # also sys.exit(): the process serves on
        return _failure(error)


def evaluate_batch(reward: BatchReward, requests: Sequence[RewardRequest]) -> list[RewardResult]:
    """What the reward says of each request; where it raises, they are tried one by one, and only the guilty fail."""
    try:
        values = list(reward.score_batch(requests))
    except BaseException as error:
        if len(requests) == 1:
            return [_failure(error)]
        return [result for request in requests for result in evaluate_batch(reward, [request])]
    if len(values) != len(requests):
        wrong = _Unusable(f"returned {len(values)} scores for {len(requests)} requests")
        return [_failure(wrong) for _ in requests]
    return [evaluate(lambda _, value=value: value, request) for value, request in zip(values, requests, strict=True)]


class _Unusable(Exception):
    """A reward returned something else."""


def _result(value: object) -> RewardResult:
    verdict = value if isinstance(value, Verdict) else Verdict(value)  # pyright: ignore[reportArgumentType]
    score = _number(verdict.score)
    components = {str(name): _number(part) for name, part in verdict.components.items()}
    return RewardResult(score, None, _answer(verdict.answer), components)


def _failure(error: BaseException) -> RewardResult:
    text = _text_of(error)
    if isinstance(error, MemoryError) and not text:
        text = "out of memory"
    told = text if isinstance(error, _Unusable) else f"{type(error).__name__}: {text}"
    return RewardResult(0.0, told if len(told) <= _MAX_FAILURE_CHARS else told[:_MAX_FAILURE_CHARS] + "...")


def _answer(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise _Unusable(f"returned the answer {value!r}, not a text")
    return value


def _number(value: object) -> float:
    if not isinstance(value, SupportsFloat):
        raise _Unusable(f"returned {value!r}, not a number")
    if not math.isfinite(number := float(value)):
        raise _Unusable(f"returned {number}, not a finite number")
    if abs(number) > _MAX_FLOAT32:
        raise _Unusable(f"returned {number}, more than training's float32 holds")
    return number


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be shown)"


def _end_with_parent(parent_pid: int) -> None:
    # The kernel is asked, not the connection, whose other end a fork of the parent may hold open. (Linux's
    # parent-death signal fires when the *thread* ends that started the worker, which may be a short-lived one.)
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_CHECK_S)
    _kill_own_group()


def _kill_own_group() -> None:
    """End this process and whatever the reward started; the pool made it a group of its own."""
    os.killpg(os.getpgid(0), signal.SIGKILL)
