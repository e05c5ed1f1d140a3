"""Read the folder of a run, whether it is running, finished or killed."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from roll_gspo.errors import DataError

Points = list[tuple[int, float]]
"""(step, value) in the order of steps. Steps without a finite value are left out."""

Sample = dict[str, Any]
"""A line of `rollouts/step_*.jsonl`; any key may be missing. Two keys are added: `sample`, the number of the line,
and `updated_log_probs` if the sample was scored again after the update."""

# The mean score of all samples, or of those that dynamic sampling kept if the former is not logged.
SCORE = ("rollout/score_mean", "reward/score_mean")
VALIDATION = ("validation/score_mean",)
MAX_LOG_WARNINGS = 40
_MAX_ROLLOUT_BYTES = 4 * 2**20
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ (WARNING|ERROR|CRITICAL) ")


@dataclass(frozen=True)
class RolloutFile:
    """A file with the samples of one step."""

    step: int
    path: Path


@dataclass(frozen=True)
class Rollout:
    """The samples of one step.

    Attributes:
        step: in which they were sampled.
        samples: those in the first bytes of the file, and those that were scored again after the update.
        is_complete: `samples` holds every sample of the file.
        num_bytes: number of bytes that were read.
    """

    step: int
    samples: list[Sample]
    is_complete: bool
    num_bytes: int


@dataclass(frozen=True)
class RunFolder:
    """The contents of a run's folder.

    Attributes:
        name: `exp_name` of the config, else the folder's name.
        rows: lines of metrics.jsonl ordered by step, one per step.
        rollouts: samples of a few steps, evenly from the first to the last.
        rollout_files, validation_files: files of all steps with samples of training and of validation, in order.
        config, plan: texts; empty if the file is missing.
        log_warnings: the latest warnings and errors of run.log.
        traces: profiler traces, relative to the folder.
        launches: facts about each process of the run, oldest first.
    """

    name: str
    rows: list[dict[str, Any]]
    rollouts: list[Rollout]
    rollout_files: list[RolloutFile]
    validation_files: list[RolloutFile]
    config: str
    plan: str
    log_warnings: list[str]
    traces: list[str]
    launches: list[dict[str, Any]]

    @cached_property
    def steps(self) -> list[int]:
        """Every step that was logged."""
        return [row["step"] for row in self.rows]

    @cached_property
    def metric_names(self) -> list[str]:
        """Every metric that was ever logged, sorted."""
        return sorted({name for row in self.rows for name in row} - {"step"})

    def points(self, name: str) -> Points:
        """Return one metric over the steps."""
        values = ((row["step"], row.get(name)) for row in self.rows)
        return [(step, float(v)) for step, v in values if isinstance(v, int | float) and math.isfinite(v)]

    def first_points(self, names: Sequence[str]) -> Points:
        """Return the first of the metrics that has points; empty if none has."""
        return next((points for name in names if (points := self.points(name))), [])

    def not_finite(self) -> dict[str, list[int]]:
        """Return, for each metric that was NaN or infinite, the steps at which it was."""
        found: dict[str, list[int]] = {}
        for row in self.rows:
            for name, value in row.items():
                if value is None:
                    found.setdefault(name, []).append(row["step"])
        return found


def read_run(folder: Path, num_rollouts: int = 4) -> RunFolder:
    """Read the folder of a run, with the samples of `num_rollouts` steps.

    Raises:
        DataError: there is no metrics.jsonl.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{folder}: no metrics.jsonl; give the output folder of a run")
    by_step = {row["step"]: row for row in _json_lines(metrics.read_bytes()) if isinstance(row.get("step"), int)}
    config = _text(folder / "config.yaml")
    files = _rollout_files(folder / "rollouts")
    exp_name = re.search(r"^exp_name:[ \t]*(\S.*?)[ \t]*$", config, re.MULTILINE)
    return RunFolder(
        name=exp_name[1].strip("'\"") if exp_name else folder.resolve().name,
        rows=[by_step[step] for step in sorted(by_step)],
        rollouts=_evenly_chosen_rollouts(files, num_rollouts),
        rollout_files=files,
        validation_files=_rollout_files(folder / "validation"),
        config=config,
        plan=_text(folder / "plan.txt"),
        log_warnings=_log_warnings(folder / "run.log"),
        traces=sorted(path.relative_to(folder).as_posix() for path in folder.glob("profile/*.json.gz")),
        launches=_json_lines(_text(folder / "launches.jsonl").encode()),
    )


def read_rollout(file: RolloutFile, max_bytes: int = _MAX_ROLLOUT_BYTES) -> Rollout:
    """Read the first samples of a step, and all that were scored again after the update."""
    updated_file = file.path.with_name(f"{file.path.stem}.updated.jsonl")
    updated = _json_lines(_head(updated_file, max_bytes)) if updated_file.is_file() else []
    head = _head(file.path, max_bytes)
    size = file.path.stat().st_size
    samples = {line: row for line, row in enumerate(_lines(head), 1) if row is not None}
    num_bytes = len(head)
    for row in updated:
        index, offset, log_probs = (row.get(name) for name in ("sample", "offset", "log_probs"))
        if not isinstance(index, int) or not isinstance(offset, int) or not isinstance(log_probs, list):
            continue
        line = index + 1
        if line not in samples:  # beyond the first bytes
            with file.path.open("rb") as opened:
                opened.seek(offset)
                text = opened.readline(max_bytes)
            num_bytes += len(text)
            samples.update((line, found) for found in _json_lines(text))
        if line in samples:
            samples[line]["updated_log_probs"] = log_probs
    numbered = [row | {"sample": line - 1} for line, row in sorted(samples.items())]
    return Rollout(file.step, numbered, len(head) >= size, num_bytes)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _head(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(max_bytes)


def _json_lines(data: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects, without lines that a kill or the byte limit cut off."""
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


def _evenly_chosen_rollouts(files: Sequence[RolloutFile], count: int) -> list[Rollout]:
    last = len(files) - 1
    chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count)}) if files else []
    read = [read_rollout(files[i]) for i in chosen]
    return [rollout for rollout in read if rollout.samples]


def _log_warnings(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return list(deque((line.rstrip() for line in file if _LOG_LINE.match(line)), MAX_LOG_WARNINGS))
