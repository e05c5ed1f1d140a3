"""Checks of a machine, each with a time limit, and the findings that they print."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from roll_gspo.errors import RollGspoError


class Status(StrEnum):
    """Result of a check."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        status: the result.
        text: what was found; for a warning or an error also what to do.
        topic: what was checked, if it differs from the name of the check.
    """

    status: Status
    text: str
    topic: str = ""


Findings = Iterable[Finding]


@dataclass(frozen=True)
class Check:
    """A check of the machine.

    Attributes:
        topic: what is checked.
        run: the check. A `RollGspoError` is an error with one finding per line of its message.
        timeout_s: time limit.
        needs: what `--offline` does not have, e.g. `a GPU`; empty if the check runs anywhere.
    """

    topic: str
    run: Callable[[], Findings]
    timeout_s: float = 30.0
    needs: str = ""


def ok(text: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(Status.OK, text)


def warning(text: str) -> Finding:
    """Return a finding that may disturb a run."""
    return Finding(Status.WARNING, text)


def error(text: str) -> Finding:
    """Return a finding that prevents a run."""
    return Finding(Status.ERROR, text)


def not_checked(text: str) -> Finding:
    """Return a finding for what cannot be checked here."""
    return Finding(Status.NOT_CHECKED, text)


def run_checks(checks: Sequence[Check], offline: bool) -> Iterator[Finding]:
    """Run checks in order and yield their findings; with `offline`, those that need more are not run."""
    for check in checks:
        if offline and check.needs:
            findings: Findings = [not_checked(f"needs {check.needs}")]
        else:
            findings = _run(check)
        for finding in findings:
            yield Finding(finding.status, finding.text, finding.topic or check.topic)


def _run(check: Check) -> Findings:
    """Run a check in a thread, which is abandoned after the time limit."""
    found: list[Finding] = []

    def work() -> None:
        try:
            found.extend(check.run())
        except RollGspoError as problem:
            found.extend(error(line) for line in str(problem).splitlines())
        except Exception as problem:
            found.append(error(f"the check failed ({type(problem).__name__}: {problem}); report this"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(check.timeout_s)
    if thread.is_alive():
        return [error(f"no answer within {check.timeout_s:g} s; look for a process or a file system that hangs")]
    return found


def text_of(finding: Finding) -> str:
    """Return the line of a finding."""
    return f"  {finding.status:<11} {finding.topic:<14} {finding.text}"


def summary(findings: Sequence[Finding]) -> str:
    """Return the last line: how many findings have each status."""
    counts = {status: sum(finding.status == status for finding in findings) for status in Status}
    problems = ", ".join(f"{counts[s]} {s}{'s' * (counts[s] > 1)}" for s in (Status.ERROR, Status.WARNING) if counts[s])
    unchecked = f", {counts[Status.NOT_CHECKED]} not checked" if counts[Status.NOT_CHECKED] else ""
    return f"{problems or 'no problems'}{unchecked}"
