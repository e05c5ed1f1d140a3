"""A pool of processes that run a function as the ranks of a gloo world.

The processes are forked from one that has imported the engines. Every job gets a new process group.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forked_command import engines_imported

# A destroyed gloo group leaves a thread behind that wakes a hundred times per second.
_JOBS_PER_PROCESS = 16


class Ranks:
    """A pool of processes; `run` forms a gloo world of the first `world_size` of them.

    A job that fails or exceeds its time limit ends the processes of the pool; the next job starts new ones.
    """

    def __init__(self) -> None:
        self._members: list[tuple[Any, Connection]] = []
        self._num_jobs = 0

    def run(self, world_size: int, job: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
        """Run `job(*args)` on every rank of a world and return the results by rank.

        Args:
            world_size: number of ranks.
            job: an importable function; `torch.distributed` is initialised when it runs.
            timeout_s: time limit of the job.

        Raises:
            AssertionError: with the traceback of each failed rank, or the ranks that exceeded the limit.
        """
        if self._num_jobs % _JOBS_PER_PROCESS == 0:
            self.close()
        self._num_jobs += 1
        while len(self._members) < world_size:
            context = engines_imported()
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
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
        """Kill the processes."""
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
    """Run jobs until the pipe closes."""
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
        gc.collect()  # models refer to their groups in reference cycles
