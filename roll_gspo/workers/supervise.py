"""Program that runs one command of the user: it ends with the controller and leaves no process behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from roll_gspo.workers.child import adopt_orphans, exit_with_parent, kill_descendants, limit_memory
from roll_gspo.workers.process import import_path

NOT_FOUND = 127
_KILLED_BY = 128
_LAUNCH_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from roll_gspo.workers.supervise import main; main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[4:])"
)


def supervised(command: Sequence[str], max_memory_mb: int | None) -> list[str]:
    """Return the arguments of a process that runs `command` and has its exit code.

    Start it as the leader of a process group. The process exits with 128 plus the number of a signal that ended the
    command, and with 127 if the command cannot be started.

    Args:
        command: the program and its arguments.
        max_memory_mb: MiB that each process of the command may allocate; None for no limit.
    """
    # An editable installation is found by a hook of `site`, not by a path.
    paths = [*import_path(), str(Path(__file__).parents[2])]
    own = (str(os.getpid()), str(max_memory_mb or 0), json.dumps(paths))
    return [sys.executable, "-I", "-S", "-c", _LAUNCH_CODE, *own, *command]


def main(parent_pid: int, max_memory_mb: int, command: Sequence[str]) -> NoReturn:
    """Run the command, then kill what it left behind.

    Args:
        parent_pid: process id of the controller.
        max_memory_mb: MiB that each process may allocate; 0 for no limit.
        command: the program and its arguments.
    """
    adopt_orphans()
    exit_with_parent(parent_pid)
    limit_memory(max_memory_mb or None)
    try:
        code = subprocess.Popen(command).wait()
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(NOT_FOUND)
    kill_descendants()
    os._exit(code if code >= 0 else _KILLED_BY - code)
