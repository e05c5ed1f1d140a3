"""A lock on the folder of a run: no two processes write into it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from roll_gspo.errors import ConfigError

LOCK = ".lock"


@dataclass(frozen=True)
class Holder:
    """The process that writes into a folder.

    Attributes:
        host: name of its machine.
        pid: its process id there.
        started: start of the process in clock ticks since boot, because ids are used again.
        since: when it took the lock, for people.
    """

    host: str
    pid: int
    started: int
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        """Return this process."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), os.getpid(), _start_ticks(os.getpid()) or 0, now)

    def is_same_process(self, other: Holder) -> bool:
        """Return whether both are one process."""
        return (self.host, self.pid, self.started) == (other.host, other.pid, other.started)

    @property
    def is_dead(self) -> bool:
        """True if the process was on this machine and has ended."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it runs as another user
            return False
        return _start_ticks(self.pid) != (self.started or None)


def check_unlocked(folder: Path, key: str) -> None:
    """Check that no other process writes into `folder`, which need not exist.

    Args:
        folder: the folder.
        key: the configuration key that names it, for the error.

    Raises:
        ConfigError: a process of this machine that runs, or one of another machine.
    """
    holder = _read(folder / LOCK)
    if holder is None or holder.is_dead or holder.is_same_process(Holder.this_process()):
        return
    who = f"process {holder.pid}"
    if holder.host == socket.gethostname():
        advice = "wait until it ends, or choose another run_name"
    else:
        who += f" on {holder.host}"
        advice = f"choose another run_name; if that process has ended, delete {folder / LOCK}"
    raise ConfigError(f"{key}: {who} has been writing into {folder} since {holder.since}; {advice}")


def lock(folder: Path, key: str) -> None:
    """Take the lock of an existing folder for this process, also from a process that has ended.

    Raises:
        ConfigError: another process holds it; see `check_unlocked`.
    """
    with _alone(folder):
        check_unlocked(folder, key)
        aside = folder / f"{LOCK}.{os.getpid()}.tmp"
        aside.write_text(json.dumps(asdict(Holder.this_process())), encoding="utf-8")
        aside.replace(folder / LOCK)


def unlock(folder: Path) -> None:
    """Release the lock if this process holds it."""
    with _alone(folder):
        holder = _read(folder / LOCK)
        if holder is not None and holder.is_same_process(Holder.this_process()):
            (folder / LOCK).unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time read and replace the lock of a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # the run was deleted meanwhile
        yield
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such lock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> Holder | None:
    """Read a lock; None if there is none or if a crash of the machine left it empty."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _start_ticks(pid: int) -> int | None:
    """Return the start time of a process; None if there is none or it has ended and only its parent does not know."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], int(fields[19])
    return None if state in "ZX" else started
