from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from roll_gspo.tracking.rollouts import RolloutRecord, RolloutWriter

RECORD = RolloutRecord(
    prompt="1+1=",
    response="2\n\u2028é<eos>",
    score=1.0,
    failed=False,
    advantage=0.5,
    ground_truth="2",
    domain="math_rule",
    group=0,
    finish_reason="stop",
    prompt_token_ids=(1, 2),
    response_token_ids=(3, 4),
    weights_version=11,
)


def test_rollouts_are_one_json_object_a_line(tmp_path: Path) -> None:
    path = RolloutWriter(tmp_path / "rollouts").write(12, [RECORD, replace(RECORD, score=math.nan, group=1)])
    assert path.name == "step_000012.jsonl"
    first, second = (json.loads(line) for line in path.read_bytes().split(b"\n")[:-1])
    assert first["response"] == RECORD.response
    assert first["response_token_ids"] == [3, 4]
    assert first["weights_version"] == 11
    assert (second["score"], second["group"]) == (None, 1)


def test_rollouts_failed_write_leaves_no_step_file(tmp_path: Path) -> None:
    def records():
        yield RECORD
        raise RuntimeError("killed half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        RolloutWriter(tmp_path).write(1, records())
    assert not (tmp_path / "step_000001.jsonl").exists()


def test_rollouts_resume_removes_later_steps_and_leftovers_only(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, [RECORD])
    (tmp_path / "step_000004.jsonl.tmp").write_text("torn")
    (tmp_path / "step_notes.jsonl").write_text("mine")
    RolloutWriter(tmp_path, first_step=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_000001.jsonl",
        "step_000002.jsonl",
        "step_notes.jsonl",
    ]
