"""Run the command and kill one of its processes at the start of a stage.

    python killing_run.py STAGE STEP VICTIM ARGUMENTS...

VICTIM is `controller`, `reward` or the name of a worker, e.g. `actor_train rank 1`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil

import roll_gspo.run
from roll_gspo.pipelines.rlvr.collect import Collected, Collector
from roll_gspo.tracking.console import Console

DELAY_S = 0.03  # by then most stages are running


def pid_of(victim: str) -> int:
    """Return the process ID of the victim."""
    if victim == "controller":
        return os.getpid()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            named = process.environ().get("ROLL_GSPO_WORKER") == victim
            if named or (victim == "reward" and "rewards.worker" in " ".join(process.cmdline())):
                return process.pid
    raise LookupError(f"no process is {victim}")


def main() -> None:
    """Run the command given by the arguments."""
    stage, step, victim = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    sys.argv[1:] = sys.argv[4:]
    progress = {"step": 0, "killed": 0}
    original_collect, original_stage = Collector.collect, Console.stage

    def collect(collector: Collector, number: int, stage: Any) -> Collected:
        progress["step"] = number
        return original_collect(collector, number, stage)

    @contextlib.contextmanager
    def stage_of(console: Console, name: str) -> Iterator[Any]:
        if name == stage and progress["step"] == step and not progress["killed"]:
            progress["killed"] = 1
            print(f"killing {victim} in {stage}", flush=True)
            threading.Timer(DELAY_S, os.kill, (pid_of(victim), signal.SIGKILL)).start()
        with original_stage(console, name) as reported:
            yield reported

    Collector.collect = collect  # type: ignore[method-assign]
    Console.stage = stage_of  # type: ignore[method-assign, assignment]
    roll_gspo.run.main()


if __name__ == "__main__":
    main()
