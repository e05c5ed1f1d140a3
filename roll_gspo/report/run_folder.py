"""Read what a run left behind, finished or not, killed or not."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.errors import DataError

Points = list[tuple[int, float]]
"""(step, value), in the order of steps; where a figure is missing or was not finite there is no point."""

MAX_WARNINGS = 40
_MAX_ROLLOUT_BYTES = 4 * 2**20
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ (WARNING|ERROR|CRITICAL) ")


@dataclass(frozen=True)
class Rollout:
    """The samples kept of one step; the keys are those of `rollouts/step_*.jsonl`, any may be missing."""

    step: int
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it.

    Attributes:
        name: `exp_name` of the config, else the folder's name.
        rows: lines of metrics.jsonl, ordered by step, one a step.
        rollouts: of a few steps from the first to the last.
        config, plan: texts, empty where the files are missing.
        warnings: the latest warnings and errors of run.log.
    """

    name: str
    rows: list[dict[str, Any]]
    rollouts: list[Rollout]
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
    by_step = {row["step"]: row for row in _json_lines(metrics) if isinstance(row.get("step"), int)}
    config = _text(folder / "config.yaml")
    named = re.search(r"^exp_name:[ \t]*(\S.*?)[ \t]*$", config, re.MULTILINE)
    return RunFolder(
        name=named[1].strip("'\"") if named else folder.resolve().name,
        rows=[by_step[step] for step in sorted(by_step)],
        rollouts=_rollouts(folder / "rollouts", num_rollouts),
        config=config,
        plan=_text(folder / "plan.txt"),
        warnings=_warnings(folder / "run.log"),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json_lines(path: Path, max_bytes: int | None = None) -> list[dict[str, Any]]:
    """Whole JSON objects; torn lines (a kill, the byte limit) are passed over."""
    with path.open("rb") as file:
        lines = file.read(-1 if max_bytes is None else max_bytes).splitlines()
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _rollouts(folder: Path, count: int) -> list[Rollout]:
    found = [(re.fullmatch(r"step_(\d+)\.jsonl", path.name), path) for path in folder.glob("step_*.jsonl")]
    steps = sorted((int(match[1]), path) for match, path in found if match)
    last = len(steps) - 1
    chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count)}) if steps else []
    read = [Rollout(steps[i][0], _json_lines(steps[i][1], _MAX_ROLLOUT_BYTES)) for i in chosen]
    return [rollout for rollout in read if rollout.samples]


def _warnings(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return list(deque((line.rstrip() for line in file if _LOG_LINE.match(line)), MAX_WARNINGS))
