"""Processes that form process groups: what several ranks compute, asked from one test.

The processes are forked from one that has imported the engines; every job gets a process group of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "roll_gspo.strategies.megatron.engine", "parallel_cases"])
# Groups that are over leave threads behind, each of which wakes a hundred times a second.
_JOBS_OF_A_PROCESS = 16


class Ranks:
    """A pool of processes; `run` makes a gloo world of the first `world_size` of them.

    A job that fails or takes too long ends the pool's processes; the next job starts new ones.
    """

    def __init__(self) -> None:
        self._members: list[tuple[Any, Connection]] = []
        self._num_jobs = 0

    def run(self, world_size: int, job: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
        """`job(*args)` on every rank of a world; what each returned, by rank.

        Args:
            world_size: ranks.
            job: a function of a module that the processes can import; with `torch.distributed` initialised.
            timeout_s: after which the job is taken for hung.

        Raises:
            AssertionError: with the traceback of each rank that failed, or the ranks that are late.
        """
        if self._num_jobs % _JOBS_OF_A_PROCESS == 0:
            self.close()
        self._num_jobs += 1
        while len(self._members) < world_size:
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))
        members = self._members[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(members):
                pipe.send((rank, world_size, str(Path(folder) / "store"), timeout_s, job, args))
            answers = [_answer(pipe, timeout_s) for _, pipe in members]
        if any(answer is None or answer[0] == "error" for answer in answers):
            self.close()
            texts = [
                f"rank {rank}: " + (f"no answer within {timeout_s:g} s" if answer is None else answer[1])
                for rank, answer in enumerate(answers)
                if answer is None or answer[0] == "error"
            ]
            raise AssertionError("\n".join(texts))
        return [answer[1] for answer in answers if answer is not None]

    def close(self) -> None:
        """End the processes."""
        while self._members:
            process, pipe = self._members.pop()
            pipe.close()
            process.kill()
            process.join(10)


def _answer(pipe: Connection, timeout_s: float) -> tuple[str, Any] | None:
    try:
        return pipe.recv() if pipe.poll(timeout_s) else None
    except EOFError:
        return "error", "the process died"


def _serve(pipe: Connection) -> None:
    """One process: jobs until the pipe closes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    while True:
        try:
            rank, world_size, store, timeout_s, job, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", _in_world(rank, world_size, store, timeout_s, job, args)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))


def _in_world(
    rank: int, world_size: int, store: str, timeout_s: float, job: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    try:
        return job(*args)
    finally:
        if "megatron.core.parallel_state" in sys.modules:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        gc.collect()  # models hold their groups in cycles
