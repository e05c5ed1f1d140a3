"""Run the jobs of a --multirun: one process per combination of values, one or several at a time."""

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

from roll_gspo.errors import ConfigError
from roll_gspo.printable import printable, printable_line

_POLL_S = 0.2
_MAX_FAILED_LINES = 30


@dataclass
class _Job:
    """A running job; `log` is None if it writes to the output of this process."""

    name: str
    process: subprocess.Popen[bytes]
    log: IO[bytes] | None
    started: float


class Sweep:
    """Runs jobs in processes. After a job has failed, no further job starts.

    Each job needs a new process, because engines keep process-wide state. Ctrl-C also reaches the jobs. They finish
    their step and save, and this process waits for them.

    Args:
        limit: maximum number of jobs at a time. If it is above 1, only start and end of each job are printed; the rest
            is in its run.log.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: list[_Job] = []
        self._status = 0

    def start(self, command: list[str], name: str) -> None:
        """Start a job when fewer than `limit` are running. With a limit of 1, wait until it ends.

        Raises:
            SystemExit: a job failed, with its exit status.
        """
        self._wait(self._limit - 1)
        if self._status:
            self.finish()
        log = tempfile.TemporaryFile() if self._limit > 1 else None  # noqa: SIM115 - closed when the job ends
        environment = dict(os.environ)
        if log is not None:
            print(f"started {printable_line(name)}", flush=True)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._limit)))
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self._running.append(_Job(name, process, log, time.perf_counter()))
        if self._limit == 1:
            self.finish()

    def finish(self) -> None:
        """Wait for all running jobs.

        Raises:
            SystemExit: a job failed, with its exit status.
        """
        self._wait(0)
        if self._status:
            raise SystemExit(self._status)

    def _wait(self, max_running: int) -> None:
        """Wait until at most `max_running` jobs are running."""
        previous = signal.signal(signal.SIGINT, lambda number, frame: None)
        try:
            while len(self._running) > max_running:
                for job in [j for j in self._running if j.process.poll() is not None]:
                    self._running.remove(job)
                    self._close(job)
                if len(self._running) > max_running:
                    time.sleep(_POLL_S)
        finally:
            signal.signal(signal.SIGINT, previous)

    def _close(self, job: _Job) -> None:
        """Keep the exit status of the first failed job, and print the result of a job with a log."""
        code = job.process.returncode
        self._status = self._status or (code if code >= 0 else 128 - code)
        if job.log is None:
            return
        seconds = time.perf_counter() - job.started
        result = f"FAILED (exit status {code})" if code else "finished"
        print(f"{result} {printable_line(job.name)} after {seconds:.0f} s", flush=True)
        job.log.seek(0)
        output = job.log.read().decode(errors="replace").splitlines()
        job.log.close()
        if code or os.environ.get("ROLL_GSPO_DRY_RUN"):
            print(printable("\n".join(output[-_MAX_FAILED_LINES:] if code else output)), flush=True)


def job_command(flags: list[str], overrides: list[str], swept: set[str], number: int) -> tuple[list[str], str]:
    """Return the command line of a job and the name of its run.

    Args:
        flags: command-line flags of the --multirun.
        overrides: of this job, as Hydra passes them.
        swept: keys that the --multirun varies.
        number: of the job, from 0.
    """
    command = [sys.executable, "-m", "roll_gspo.run", *(f for f in flags if f not in ("-m", "--multirun")), *overrides]
    names = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("run_name=")]
    varied = [o for o in overrides if o.lstrip("+").partition("=")[0] in swept]
    name = names[-1] if names else run_name(varied, number)
    if not names:
        command.append(f"run_name='{name}'")
    if os.environ.get("ROLL_GSPO_DRY_RUN"):
        command.append("--dry-run")
    return command, name


def swept_keys(overrides: list[str]) -> set[str]:
    """Return the keys that a --multirun varies.

    They are read from the command line, because Hydra rewrites the overrides that it passes to a job.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {str(override.key_or_group) for override in parsed if override.is_sweep_override()}


def run_name(overrides: list[str], number: int) -> str:
    """Return the name of a run.

    The same values give the same name, so that `resume_from_checkpoint=true` continues the runs of a sweep.
    """
    words = [re.sub(r"[^\w.,-]+", "-", override.lstrip("+")) for override in overrides]
    return "_".join([f"{number:03d}", *words])[:120]


def parse_jobs(arguments: list[str]) -> tuple[int, list[str]]:
    """Split `--jobs N` (or `--jobs=N`) from the command line: return (N, the other arguments), N is 1 if omitted.

    Raises:
        ConfigError: N is not an integer of at least 1.
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
        raise ConfigError(f"--jobs: expected the number of runs at a time, at least 1 (got '{jobs}')")
    return int(jobs), others
