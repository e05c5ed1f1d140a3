"""Program that runs a server until its owner ends. It is started by path and imports only the standard library.

`supervisor.py OWNER_PID FOLDER COMMAND...` leads a process group. When the owner ends for any reason, FOLDER is removed
and the group is killed. When the command ends, the group is killed and FOLDER is kept, because the owner reads its log.
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
    """Start the command and wait until it or the owner ends.

    Args:
        owner_pid: process id of the parent.
        folder: folder to remove when the owner ends.
        command: command line of the server.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner handles Ctrl-C
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while os.getppid() == owner_pid and server.poll() is None:
        time.sleep(_CHECK_S)
    if os.getppid() != owner_pid:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"exited with code {server.returncode}", flush=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
