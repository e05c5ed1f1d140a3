"""A run folder with samples of every kind, for what reads and shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from roll_gspo.tracking.rollouts import RolloutRecord, RolloutWriter, UpdatedRecord, compact


def record(tokens: Sequence[str] = ("4", "2", "<|end|>"), **changes: object) -> RolloutRecord:
    """A sample whose response has these tokens; token i has log-prob -(i + 1) / 4 and the engine says 0.01 more."""
    old = [-(i + 1) / 4 for i in range(len(tokens))]
    plain = RolloutRecord(
        prompt="<|user|>What is 6 * 7?<|assistant|>",
        response="".join(tokens),
        score=1.0,
        failed=False,
        advantage=0.5,
        ground_truth="42",
        domain="maths",
        group=0,
        finish_reason="stop",
        prompt_token_ids=(1, 2),
        response_token_ids=tuple(range(len(tokens))),
        weights_version=3,
        failure=None,
        answer="42",
        components={"correct": 1.5, "length": -0.5},
        response_tokens=tuple(tokens),
        rollout_log_probs=compact(v + 0.01 for v in old),
        old_log_probs=compact(old),
        advantages=compact([0.5] * len(tokens)),
    )
    return replace(plain, **changes)


def write_step(folder: Path, step: int, records: Sequence[RolloutRecord], traced: Sequence[int] = ()) -> None:
    """A step of a run: a line of metrics and its samples; those `traced` gained 0.1 in each log-prob."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "reward/score_mean": 0.5}) + "\n")
    writer = RolloutWriter(folder / "rollouts", step)
    writer.write(step, records)
    gained = [UpdatedRecord(i, compact((v or 0.0) + 0.1 for v in records[i].old_log_probs)) for i in traced]
    if gained:
        writer.write_updated(step, gained)
