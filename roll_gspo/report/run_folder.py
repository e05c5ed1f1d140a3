"""Read what a run left behind, finished or not, killed or not."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.errors import DataError

Points = list[tuple[int, float]]
"""(step, value), in the order of steps; where a figure is missing or was not finite there is no point."""

MAX_WARNINGS = 40
_MAX_ROLLOUT_BYTES = 4 * 2**20
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ (WARNING|ERROR|CRITICAL) ")


Sample = dict[str, Any]
"""The keys are those of `rollouts/step_*.jsonl`, any may be missing. Added are `line`, its line in the file from 1, and
`updated_log_probs` where the sample was scored again after the update."""


@dataclass(frozen=True)
class RolloutFile:
    """A file of samples that is there."""

    step: int
    path: Path


@dataclass(frozen=True)
class Rollout:
    """The samples of one step.

    Attributes:
        step: in which they were drawn.
        samples: as many as are in the first bytes of the file, and those that were scored again.
        whole: those are all of them.
        num_bytes: that were read.
    """

    step: int
    samples: list[Sample]
    whole: bool
    num_bytes: int


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it.

    Attributes:
        name: `exp_name` of the config, else the folder's name.
        rows: lines of metrics.jsonl, ordered by step, one a step.
        rollouts: of a few steps from the first to the last.
        rollout_files: every step's, in order.
        config, plan: texts, empty where the files are missing.
        warnings: the latest warnings and errors of run.log.
    """

    name: str
    rows: list[dict[str, Any]]
    rollouts: list[Rollout]
    rollout_files: list[RolloutFile]
    config: str
    plan: str
    warnings: list[str]

    @property
    def steps(self) -> list[int]:
        """Every step that was logged."""
        return [row["step"] for row in self.rows]

    def names(self) -> list[str]:
        """Every metric that was ever logged, sorted."""
        return sorted({name for row in self.rows for name in row} - {"step"})

    def points(self, name: str) -> Points:
        """One metric over the steps."""
        values = ((row["step"], row.get(name)) for row in self.rows)
        return [(step, float(v)) for step, v in values if isinstance(v, int | float) and math.isfinite(v)]

    def not_finite(self) -> dict[str, list[int]]:
        """Metric to the steps at which it was NaN or infinite."""
        found: dict[str, list[int]] = {}
        for row in self.rows:
            for name, value in row.items():
                if value is None:
                    found.setdefault(name, []).append(row["step"])
        return found


def read_run(folder: Path, num_rollouts: int = 4) -> RunFolder:
    """Read everything that the page shows.

    Raises:
        DataError: there is no metrics.jsonl.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{folder}: no metrics.jsonl; give the output folder of a run")
    by_step = {row["step"]: row for row in _json_lines(metrics.read_bytes()) if isinstance(row.get("step"), int)}
    config = _text(folder / "config.yaml")
    files = _rollout_files(folder / "rollouts")
    named = re.search(r"^exp_name:[ \t]*(\S.*?)[ \t]*$", config, re.MULTILINE)
    return RunFolder(
        name=named[1].strip("'\"") if named else folder.resolve().name,
        rows=[by_step[step] for step in sorted(by_step)],
        rollouts=_rollouts(files, num_rollouts),
        rollout_files=files,
        config=config,
        plan=_text(folder / "plan.txt"),
        warnings=_warnings(folder / "run.log"),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_rollout(file: RolloutFile, max_bytes: int = _MAX_ROLLOUT_BYTES) -> Rollout:
    """The first samples of a step, and those scored again after the update wherever they are in the file."""
    updated = file.path.with_name(f"{file.path.stem}.updated.jsonl")
    again = _json_lines(_head(updated, max_bytes)) if updated.is_file() else []
    head = _head(file.path, max_bytes)
    size = file.path.stat().st_size
    samples = {line: row for line, row in enumerate(_lines(head), 1) if row is not None}
    num_bytes = len(head)
    for row in again:
        line, offset, log_probs = (row.get(name) for name in ("sample", "offset", "log_probs"))
        if not isinstance(line, int) or not isinstance(offset, int) or not isinstance(log_probs, list):
            continue
        if line + 1 not in samples:
            with file.path.open("rb") as opened:
                opened.seek(offset)
                text = opened.readline(max_bytes)
            num_bytes += len(text)
            samples.update((line + 1, found) for found in _json_lines(text))
        if line + 1 in samples:
            samples[line + 1]["updated_log_probs"] = log_probs
    numbered = [row | {"line": line} for line, row in sorted(samples.items())]
    return Rollout(file.step, numbered, len(head) >= size, num_bytes)


def _head(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(max_bytes)


def _json_lines(data: bytes) -> list[dict[str, Any]]:
    """Whole JSON objects; torn lines (a kill, the byte limit) are passed over."""
    return [row for row in _lines(data) if row is not None]


def _lines(data: bytes) -> Iterator[dict[str, Any] | None]:
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield row if isinstance(row, dict) else None


def _rollout_files(folder: Path) -> list[RolloutFile]:
    found = [(re.fullmatch(r"step_(\d+)\.jsonl", path.name), path) for path in folder.glob("step_*.jsonl")]
    return sorted((RolloutFile(int(m[1]), path) for m, path in found if m), key=lambda file: file.step)


def _rollouts(files: Sequence[RolloutFile], count: int) -> list[Rollout]:
    last = len(files) - 1
    chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count)}) if files else []
    read = [read_rollout(files[i]) for i in chosen]
    return [rollout for rollout in read if rollout.samples]


def _warnings(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return list(deque((line.rstrip() for line in file if _LOG_LINE.match(line)), MAX_WARNINGS))
