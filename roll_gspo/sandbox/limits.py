"""Resource limits and outcomes of programs. Imports only the standard library, because the sandbox imports it, too."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program.

    Attributes:
        wall_s: seconds per run, by the clock.
        cpu_s: seconds of CPU time per process and run.
        memory_mb: MiB of address space per process, in addition to that of the bare interpreter.
        processes: concurrent processes, including the program itself. With 1, it cannot start any.
        threads: concurrent threads of all processes.
        open_files: file descriptors per process.
        file_mb: MiB per file.
        tmp_mb: MiB of the private `/tmp`.
        output_kb: KiB of stdout per run, and the same of stderr.
    """

    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_mb: int = 1024
    processes: int = 1
    threads: int = 32
    open_files: int = 64
    file_mb: int = 16
    tmp_mb: int = 32
    output_kb: int = 4096

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = vars(self)[entry.name]
            is_int = entry.name not in ("wall_s", "cpu_s")
            if (
                isinstance(value, bool)
                or not isinstance(value, int if is_int else int | float)
                or not 0 < value < 2**31
            ):
                kind = "an integer" if is_int else "a number"
                raise ValueError(f"{entry.name} is {value!r}; use {kind} above 0")


@dataclass(frozen=True)
class Outcome:
    """Outcome of one run of a program.

    Attributes:
        status: `finished` (with any exit code), `timeout` (wall or CPU time), `output` (output limit exceeded), or
            `lost` (the sandbox died or sent an invalid message).
        exit_code: exit code of a finished program; -n if it was killed by signal n.
        stdout: standard output; for a call, the returned value as JSON.
        stderr: end of the standard error.
    """

    status: Literal["finished", "timeout", "output", "lost"]
    exit_code: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        """True if the program finished with exit code 0."""
        return self.status == "finished" and self.exit_code == 0

    @property
    def reason(self) -> str:
        """Reason of the failure in one line; empty if the program succeeded."""
        if self.ok:
            return ""
        if self.status != "finished":
            texts = {"timeout": "timeout", "output": "output limit exceeded", "lost": "the sandbox died"}
            return texts[self.status]
        last = self.stderr.strip().rpartition("\n")[2][:200]
        end = f"killed by signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return f"{end}: {last}" if last else end
