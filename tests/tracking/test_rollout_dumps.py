from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from roll_gspo.tracking.rollouts import RolloutRecord, RolloutWriter, UpdatedRecord, compact

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
    failure=None,
    answer="2",
    components={"correct": 1.0},
    response_tokens=("2\n\u2028é", "<eos>"),
    rollout_log_probs=(-0.5, -1.0),
    old_log_probs=(-0.5, None),
    advantages=(0.5, 0.5),
)


def test_rollouts_are_one_json_object_a_line(tmp_path: Path) -> None:
    path = RolloutWriter(tmp_path / "rollouts").write(12, [RECORD, replace(RECORD, score=math.nan, group=1)])
    assert path.name == "step_000012.jsonl"
    first, second = (json.loads(line) for line in path.read_bytes().split(b"\n")[:-1])
    assert first["response"] == RECORD.response
    assert first["response_token_ids"] == [3, 4]
    assert first["weights_version"] == 11
    assert (second["score"], second["group"]) == (None, 1)
    assert first["components"] == {"correct": 1.0} and first["old_log_probs"] == [-0.5, None]
    assert "".join(first["response_tokens"]) == first["response"]
    assert set(first) == {field.name for field in fields(RolloutRecord)}


def test_rollouts_figures_are_short_and_never_infinite(tmp_path: Path) -> None:
    assert compact([-0.123456789, 1e-9 / 3, math.inf, math.nan, 0.0]) == (-0.123457, 3.33333e-10, None, None, 0.0)
    broken = replace(RECORD, components={"length": math.inf}, prompt="half a character \ud83d")
    row = json.loads(RolloutWriter(tmp_path).write(1, [broken]).read_bytes())
    assert row["components"] == {"length": None} and row["prompt"] == broken.prompt


def test_rollouts_scored_again_say_where_their_samples_begin(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path)
    lines = writer.write(3, [replace(RECORD, group=group) for group in range(4)])
    path = writer.write_updated(3, [UpdatedRecord(2, (-0.25, None))])
    assert path.name == "step_000003.updated.jsonl"
    row = json.loads(path.read_bytes())
    assert (row["sample"], row["log_probs"]) == (2, [-0.25, None])
    assert json.loads(lines.read_bytes()[row["offset"] :].splitlines()[0])["group"] == 2


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
        writer.write_updated(step, [UpdatedRecord(0, (-0.5, -0.5))])
    (tmp_path / "step_000004.jsonl.tmp").write_text("torn")
    (tmp_path / "step_000002.updated.jsonl.tmp").write_text("torn")
    (tmp_path / "step_notes.jsonl").write_text("mine")
    RolloutWriter(tmp_path, first_step=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_000001.jsonl",
        "step_000001.updated.jsonl",
        "step_000002.jsonl",
        "step_000002.updated.jsonl",
        "step_notes.jsonl",
    ]
