"""metrics.jsonl: one flat JSON object per step, read by a resume and by the report.

JSON has no NaN or infinity, so a non-finite metric is written as `null`. Every line is valid JSON, and curves have a
gap there. run.log names the original value.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonlTracker:
    """Append one line per step. A resumed run continues the file.

    Args:
        path: the file, in an existing folder.
        first_step: lines of this step or later are dropped, and so is an incomplete last line. A killed process may
            have logged steps after its last checkpoint.
    """

    def __init__(self, path: Path, first_step: int = 1) -> None:
        _truncate(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line and sync it, so that it is on disk before a checkpoint of the step."""
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            figures = ", ".join(f"{name} = {metrics[name]}" for name in broken)
            logger.warning("step %d: not finite, null in metrics.jsonl: %s", step, figures)
        self._file.write(json_line({"step": step, **metrics}))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Further calls do nothing."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return every complete line of metrics.jsonl in file order; an empty list if the file does not exist."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        row = _parse(line)
        if row is not None:
            rows.append(row)
    return rows


def json_line(row: Mapping[str, Any]) -> str:
    """Return one line of strict JSON; non-finite numbers at the top level become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _truncate(path: Path, first_step: int) -> None:
    """Rewrite the file, atomically and only if needed, with the whole lines before `first_step`."""
    if not path.exists():
        return
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    kept = [line for line in lines if _keeps(line, first_step)]
    if len(kept) == len(lines):
        return
    logger.info("%s: dropped %d lines from step %d on", path.name, len(lines) - len(kept), first_step)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _keeps(line: bytes, first_step: int) -> bool:
    row = _parse(line)
    return row is not None and row["step"] < first_step and line.endswith(b"\n")
