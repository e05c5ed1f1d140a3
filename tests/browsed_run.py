"""A run folder with samples of every kind, for what reads and shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from roll_gspo.rollout_files import SCHEMA, UPDATED_FOLDER, UPDATED_SCHEMA, Sample, StepFile, step_path


def record(tokens: Sequence[str] = ("4", "2", "<|end|>"), **changes: object) -> Sample:
    """A sample whose response has these tokens; token i has log-prob -(i + 1) / 4 and the engine says 0.01 more."""
    old = [-(i + 1) / 4 for i in range(len(tokens))]
    plain: Sample = {
        "id": "row 7",
        "source": "sums",
        "prompt": "<|user|>What is 6 * 7?<|assistant|>",
        "response": "".join(tokens),
        "score": 1.0,
        "failed": False,
        "advantage": 0.5,
        "ground_truth": "42",
        "domain": "maths",
        "group": 0,
        "finish_reason": "stop",
        "response_length": len(tokens),
        "prompt_token_ids": [1, 2],
        "response_token_ids": list(range(len(tokens))),
        "weights_version": 3,
        "failure": None,
        "answer": "42",
        "components": {"correct": 1.5, "length": -0.5},
        "response_tokens": list(tokens),
        "rollout_log_probs": [v + 0.01 for v in old],
        "old_log_probs": old,
        "advantages": [0.5] * len(tokens),
    }
    return plain | changes


def write_samples(path: Path, records: Sequence[Sample]) -> None:
    """Write a file of samples in this order."""
    rows = [
        {"sample": i, **row, "components": [{"name": n, "value": v} for n, v in (row.get("components") or {}).items()]}
        for i, row in enumerate(records)
    ]
    file = StepFile(path)
    file.add(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    file.complete()


def write_step(folder: Path, step: int, records: Sequence[Sample], traced: Sequence[int] = ()) -> None:
    """A step of a run: a line of metrics and its samples; those `traced` gained 0.1 in each log-prob."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "reward/score_mean": 0.5}) + "\n")
    write_samples(step_path(folder / "rollouts", step), records)
    if traced:
        file = StepFile(step_path(folder / UPDATED_FOLDER, step), UPDATED_SCHEMA)
        gained = [{"sample": i, "log_probs": [v + 0.1 for v in records[i]["old_log_probs"]]} for i in traced]
        file.add(pa.RecordBatch.from_pylist(gained, schema=UPDATED_SCHEMA))
        file.complete()
