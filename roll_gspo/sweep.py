"""--multirun: every combination of values as a run of its own, in a process of its own, one or several at a time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO

from hydra.core.override_parser.overrides_parser import OverridesParser

POLL_S = 0.2
LAST_LINES = 30


@dataclass
class _Job:
    """A run that is under way; `log` is None where it writes to this process's own output."""

    name: str
    process: subprocess.Popen[bytes]
    log: IO[bytes] | None
    started: float


class Sweep:
    """Runs the jobs of a --multirun; the first that fails ends it, after those under way.

    Engines keep state in their process, so that each job needs a fresh one. Ctrl-C reaches the jobs, too, which
    finish their step and save: this process only waits for that.

    Args:
        limit: jobs at a time. Of several only beginnings and ends are shown: each has its run.log.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: list[_Job] = []
        self._code = 0

    def start(self, command: list[str], name: str) -> None:
        """Start a job as soon as there is a place for it; with one place, wait for its end.

        Raises:
            SystemExit: a job failed, with its exit status.
        """
        self._wait_until_at_most(self._limit - 1)
        if self._code:
            self.finish()
        log = tempfile.TemporaryFile() if self._limit > 1 else None  # noqa: SIM115 - closed when the job ends
        environment = dict(os.environ)
        if log is not None:
            print(f"started {name}", flush=True)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._limit)))
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self._running.append(_Job(name, process, log, time.perf_counter()))
        if self._limit == 1:
            self.finish()

    def finish(self) -> None:
        """Wait for the jobs under way.

        Raises:
            SystemExit: a job failed, with its exit status.
        """
        self._wait_until_at_most(0)
        if self._code:
            raise SystemExit(self._code)

    def _wait_until_at_most(self, number: int) -> None:
        previous = signal.signal(signal.SIGINT, lambda number, frame: None)
        try:
            while len(self._running) > number:
                for job in [j for j in self._running if j.process.poll() is not None]:
                    self._running.remove(job)
                    self._ended(job)
                if len(self._running) > number:
                    time.sleep(POLL_S)
        finally:
            signal.signal(signal.SIGINT, previous)

    def _ended(self, job: _Job) -> None:
        code = job.process.returncode
        self._code = self._code or (code if code >= 0 else 128 - code)
        if job.log is None:
            return
        seconds = time.perf_counter() - job.started
        print(
            f"{'finished' if not code else f'FAILED (exit status {code})'} {job.name} after {seconds:.0f} s", flush=True
        )
        job.log.seek(0)
        output = job.log.read().decode(errors="replace").splitlines()
        job.log.close()
        if code or os.environ.get("ROLL_GSPO_DRY_RUN"):
            print("\n".join(output if not code else output[-LAST_LINES:]), flush=True)


def job_command(flags: list[str], overrides: list[str], swept: set[str], number: int) -> tuple[list[str], str]:
    """The command line of a job, and the name of its run.

    Args:
        flags: of the --multirun.
        overrides: of this job, as Hydra hands them out.
        swept: the keys that the --multirun varies.
        number: of the job.
    """
    command = [sys.executable, "-m", "roll_gspo.run", *(f for f in flags if f not in ("-m", "--multirun")), *overrides]
    given = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("run_name=")]
    named = [o for o in overrides if o.lstrip("+").partition("=")[0] in swept]
    name = given[-1] if given else run_name(named, number)
    if not given:
        command.append(f"run_name='{name}'")
    if os.environ.get("ROLL_GSPO_DRY_RUN"):
        command.append("--dry-run")
    return command, name


def swept_keys(overrides: list[str]) -> set[str]:
    """Keys that a --multirun varies; what Hydra hands to a job it has rewritten, so that values cannot be compared."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {str(override.key_or_group) for override in parsed if override.is_sweep_override()}


def run_name(overrides: list[str], number: int) -> str:
    """The same for the same values, so that a sweep is gone on with by adding resume_from_checkpoint=true."""
    words = [re.sub(r"[^\w.,-]+", "-", override.lstrip("+")) for override in overrides]
    return "_".join([f"{number:03d}", *words])[:120]


def take_jobs(arguments: list[str]) -> tuple[int, list[str]]:
    """`--jobs N` (or `--jobs=N`) out of the command line: (N, the other arguments).

    Raises:
        ValueError: N is not a number of at least 1.
    """
    jobs, others = "1", []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag == "--jobs":
            jobs = value if equals else next(rest, "")
        else:
            others.append(argument)
    if not jobs.isdigit() or int(jobs) < 1:
        raise ValueError(f"--jobs: expected a number of runs at a time, 1 or more, got '{jobs}'")
    return int(jobs), others
