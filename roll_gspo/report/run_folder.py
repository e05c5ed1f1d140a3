"""Read the folder of a run, whether it is running, finished or killed."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow import ArrowException

from roll_gspo.errors import DataError
from roll_gspo.rollout_files import RolloutFile, Sample, read_samples, rollout_files

Points = list[tuple[int, float]]
"""(step, value) in the order of steps. Steps without a finite value are left out."""

# The mean score of all samples, or of those that dynamic sampling kept if the former is not logged.
SCORE = ("rollout/score_mean", "reward/score_mean")
VALIDATION = ("validation/score_mean",)
MAX_LOG_WARNINGS = 40
_MAX_ROLLOUT_BYTES = 4 * 2**20
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ (WARNING|ERROR|CRITICAL) ")


@dataclass(frozen=True)
class Rollout:
    """The samples of one step.

    Attributes:
        step: in which they were sampled.
        samples: those in the first bytes of the file that have texts. Traced ones come first in the file.
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
        return self._points_by_name.get(name, [])

    @cached_property
    def _points_by_name(self) -> dict[str, Points]:
        found: dict[str, Points] = {name: [] for name in self.metric_names}
        for row in self.rows:
            step = row["step"]
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                    found[name].append((step, float(value)))
        return found

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
    files = rollout_files(folder / "rollouts")
    exp_name = re.search(r"^exp_name:[ \t]*(\S.*?)[ \t]*$", config, re.MULTILINE)
    return RunFolder(
        name=exp_name[1].strip("'\"") if exp_name else folder.resolve().name,
        rows=[by_step[step] for step in sorted(by_step)],
        rollouts=_evenly_chosen_rollouts(files, num_rollouts),
        rollout_files=files,
        validation_files=rollout_files(folder / "validation"),
        config=config,
        plan=_text(folder / "plan.txt"),
        log_warnings=_log_warnings(folder / "run.log"),
        traces=sorted(path.relative_to(folder).as_posix() for path in folder.glob("profile/*.json.gz")),
        launches=_json_lines(_text(folder / "launches.jsonl").encode()),
    )


def read_rollout(file: RolloutFile, max_bytes: int = _MAX_ROLLOUT_BYTES) -> Rollout:
    """Read the first samples of a step that have texts. A file that cannot be read has no samples."""
    try:
        read = read_samples(file.path, max_bytes, with_text_only=True)
    except (OSError, ArrowException):
        return Rollout(file.step, [], False, 0)
    return Rollout(file.step, read.samples, len(read.samples) == read.num_samples, read.num_bytes)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json_lines(data: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects, without lines that a kill cut off."""
    found = []
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            found.append(row)
    return found


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
