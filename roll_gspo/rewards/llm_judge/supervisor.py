"""Runs a server for as long as its owner lives; started by path, with the standard library alone.

`supervisor.py OWNER_PID FOLDER COMMAND...` is the first of a process group of its own. When the command ends, or the
process that started it is gone (however it ended), the whole group is killed and FOLDER removed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

_CHECK_S = 0.5


def main(owner_pid: int, folder: str, command: list[str]) -> None:
    """Start the command and watch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to handle
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while os.getppid() == owner_pid and server.poll() is None:
        time.sleep(_CHECK_S)
    if os.getppid() != owner_pid:  # else the owner wants to read the log
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"ended with exit code {server.returncode}", flush=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
