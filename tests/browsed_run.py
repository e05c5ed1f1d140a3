"""A run folder with samples of every kind, for what reads and shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from roll_gspo.rollout_files import (
    EPISODE_SCHEMA,
    SCHEMA,
    UPDATED_FOLDER,
    UPDATED_SCHEMA,
    Sample,
    StepFile,
    step_path,
)


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


def message(role: str, content: str, fields: str | None = None) -> dict[str, str | None]:
    """A message of an environment."""
    return {"role": role, "content": content, "fields": fields}


def turn(
    answer: Sequence[str], *messages: dict[str, str | None], given: Sequence[str] = (), **changes: object
) -> Sample:
    """A turn with the tokens that it was given, the tokens of its answer, and what the environment returned."""
    plain: Sample = {
        "answer": "".join(answer),
        "messages": list(messages),
        "reward": 0.0,
        "invalid": False,
        "metrics": {},
        "given_tokens": len(given),
        "tokens": len(answer),
        "texts": [*given, *answer],
    }
    return plain | changes


def episode(turns: Sequence[Sample], end: str = "done", **changes: object) -> Sample:
    """A sample that is an episode. Sampled token i has log-prob -(i + 1) / 4."""
    tokens = [text for one in turns for text in one["texts"]]
    mask = [sampled for one in turns for sampled in [False] * one["given_tokens"] + [True] * one["tokens"]]
    values = record(tokens[: sum(mask)])
    columns: Sample = {
        "turns": [{name: value for name, value in one.items() if name != "texts"} for one in turns],
        "num_turns": len(turns),
        "end": end,
        "given_length": len(mask) - sum(mask),
        "num_rewritten": 0,
        "num_branches": 1,
        "response_mask": mask,
        "response_length": sum(mask),
        **{name: values[name] for name in ("rollout_log_probs", "old_log_probs", "advantages")},
    }
    return record(tokens) | {"components": {}, "answer": None} | columns | changes


def write_samples(path: Path, records: Sequence[Sample]) -> None:
    """Write a file of samples in this order."""
    rows = [
        {"sample": i, **row, "components": _entries(row.get("components")), "turns": _turns(row.get("turns"))}
        for i, row in enumerate(records)
    ]
    schema = EPISODE_SCHEMA if any(row["turns"] is not None for row in rows) else SCHEMA
    file = StepFile(path, schema)
    file.add(pa.RecordBatch.from_pylist(rows, schema=schema))
    file.complete()


def _entries(values: dict[str, float] | None) -> list[Sample]:
    return [{"name": name, "value": value} for name, value in (values or {}).items()]


def _turns(turns: list[Sample] | None) -> list[Sample] | None:
    return None if turns is None else [one | {"metrics": _entries(one["metrics"])} for one in turns]


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
