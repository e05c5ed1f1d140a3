"""What a program may use, and what became of a run of it. Standard library only: it is imported in the sandbox, too."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_s: seconds of one run by the clock.
        cpu_s: seconds of processor time of each of its processes in one run.
        memory_mb: MiB of address space of each of its processes, beyond the bare interpreter's.
        processes: processes at a time, its own included. 1: the kernel refuses it to start any.
        threads: threads of all its processes together.
        open_files: descriptors of each process.
        file_mb: MiB of one file.
        tmp_mb: MiB of its private `/tmp`.
        output_kb: KiB that one run may print to stdout, and as many to stderr.
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
            whole = entry.name not in ("wall_s", "cpu_s")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < 2**31:
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{entry.name} is {value!r}; give {kind} above 0")


@dataclass(frozen=True)
class Outcome:
    """What became of one run of a program.

    Attributes:
        status: `finished` (whatever its exit code), `timeout` (clock or processor time), `output` (printed too much),
            or `lost` (its sandbox ended under it, or answered nonsense).
        exit_code: of the program where it finished; -n: it died of signal n.
        stdout: what it printed; for a call the returned value as JSON.
        stderr: the end of what it printed there.
    """

    status: Literal["finished", "timeout", "output", "lost"]
    exit_code: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        """It finished, and without an error."""
        return self.status == "finished" and self.exit_code == 0

    @property
    def reason(self) -> str:
        """Why it is not ok, in a line; "" where it is."""
        if self.ok:
            return ""
        if self.status != "finished":
            texts = {"timeout": "took too long", "output": "printed too much", "lost": "ended its sandbox"}
            return texts[self.status]
        last = self.stderr.strip().rpartition("\n")[2][:200]
        how = f"died of signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return f"{how}: {last}" if last else how
