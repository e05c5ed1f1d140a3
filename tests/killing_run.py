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
    entered = {"generate": 0}
    original = Console.stage

    @contextlib.contextmanager
    def stage_of(console: Console, name: str) -> Iterator[Any]:
        entered[name] = entered.get(name, 0) + 1
        if name == stage and entered["generate"] == step:
            # only once: validation and sync_weights also run before the first step
            pid = pid_of(victim)
            threading.Timer(DELAY_S, os.kill, (pid, signal.SIGKILL)).start()
            entered["generate"] = -1000
        with original(console, name) as progress:
            yield progress

    Console.stage = stage_of  # type: ignore[method-assign, assignment]
    roll_gspo.run.main()


if __name__ == "__main__":
    main()
