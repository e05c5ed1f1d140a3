"""rollouts/step_000012.jsonl: what was sampled in a step and how it was judged, one sample a line.

step_000012.updated.jsonl beside it: what the policy says of some of these samples after the step's update.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from roll_gspo.tracking.jsonl import json_line

TokenValues = tuple[float | None, ...]
"""One figure a response token, to six significant digits; None where it is not finite."""


@dataclass(frozen=True)
class RolloutRecord:
    """One sample. Non-finite values are written as null.

    Attributes:
        prompt: text as it was sent to the engine.
        response: text of the response, special tokens left in.
        score: of the reward workers, before any normalisation.
        failed: the reward could not be computed; `score` is the stand-in.
        advantage: mean over the response's tokens.
        ground_truth: what the reward compared with, if anything.
        domain: which reward judged it.
        group: samples of one prompt share this number.
        finish_reason: `stop` or `length`.
        prompt_token_ids, response_token_ids: what was trained on.
        weights_version: of the policy that sampled it.
        failure: why there is no score, or None.
        answer: the final answer as the reward read it, or None.
        components: the parts that the score is made of, by name.
        response_tokens: text of each response token; joined they are the response.
        rollout_log_probs: log-probability of each response token in the generation engine.
        old_log_probs: the same of the policy that the ratio is taken against: the trainer's, where those are computed.
        advantages: of each response token.
    """

    prompt: str
    response: str
    score: float
    failed: bool
    advantage: float
    ground_truth: str | None
    domain: str | None
    group: int
    finish_reason: str
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    weights_version: int
    failure: str | None
    answer: str | None
    components: Mapping[str, float]
    response_tokens: tuple[str, ...]
    rollout_log_probs: TokenValues
    old_log_probs: TokenValues
    advantages: TokenValues


@dataclass(frozen=True)
class UpdatedRecord:
    """One sample, scored again after the update of its step.

    Attributes:
        sample: its line in the step's file, from 0.
        log_probs: of its response tokens.
    """

    sample: int
    log_probs: TokenValues


def compact(values: Iterable[float]) -> TokenValues:
    """Round values to the digits of single precision, which are short to write."""
    return tuple(float(f"{value:.6g}") if math.isfinite(value) else None for value in values)


class RolloutWriter:
    """Write the files of a step into `folder`, each complete or absent.

    Args:
        folder: `rollouts/` of the run; made with the first step.
        first_step: files of this step or later come from an earlier process and are removed.
    """

    def __init__(self, folder: Path, first_step: int = 1) -> None:
        self._folder = folder
        self._offsets: list[int] = []
        for path in folder.glob("step_*.jsonl*"):
            match = re.fullmatch(r"step_(\d+)(?:\.updated)?\.jsonl(\.tmp)?", path.name)
            if match and (match[2] or int(match[1]) >= first_step):
                path.unlink()

    def write(self, step: int, records: Iterable[RolloutRecord]) -> Path:
        """Write one step's samples and return the file."""
        path, self._offsets = self._write(f"step_{step:06d}.jsonl", map(_row, records))
        return path

    def write_updated(self, step: int, records: Iterable[UpdatedRecord]) -> Path:
        """Write what the updated policy says of samples of the step that was written last, and return the file.

        Each line also says at which byte of the step's file the sample begins.
        """
        rows = ({**_row(record), "offset": self._offsets[record.sample]} for record in records)
        return self._write(f"step_{step:06d}.updated.jsonl", rows)[0]

    def _write(self, name: str, rows: Iterable[dict[str, Any]]) -> tuple[Path, list[int]]:
        """The file, and where its lines begin."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        temporary = path.with_name(name + ".tmp")
        offsets = []
        with temporary.open("wb") as file:
            for row in rows:
                offsets.append(file.tell())
                # half a character of two (a lone surrogate, as JSON data may hold) is no UTF-8; its escape is JSON
                file.write(json_line(row).encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return path, offsets


def _row(record: RolloutRecord | UpdatedRecord) -> dict[str, Any]:
    row = {field.name: record.__dict__[field.name] for field in fields(record)}
    if isinstance(record, RolloutRecord):
        row["components"] = {name: v if math.isfinite(v) else None for name, v in record.components.items()}
    return row
