"""launches.jsonl: where, when and from which code each process of a run started."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

LAUNCHES = "launches.jsonl"
_PACKAGE = Path(__file__).resolve().parents[1]
_GIT_TIMEOUT_S = 10.0


def record_launch(folder: Path) -> None:
    """Append the facts about this process to `launches.jsonl` in the run's folder."""
    facts = {
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": git_commit(Path.cwd()) or git_commit(_PACKAGE),
        "pid": os.getpid(),
        "python": sys.version.split()[0],
        "command": shlex.join(sys.orig_argv),
        "folder": str(Path.cwd()),
    }
    with (folder / LAUNCHES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: value for name, value in facts.items() if value is not None}) + "\n")


def git_commit(folder: Path) -> str | None:
    """Return the commit of the git repository that holds `folder`, `-dirty` if tracked files differ."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
