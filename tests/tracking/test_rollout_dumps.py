from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from roll_gspo.batch import Completion, Prompt, Rollouts, TrainBatch
from roll_gspo.errors import TrainingError
from roll_gspo.pipelines.rlvr.sample_records import rows_with_text, sample_batch, token_lists_of
from roll_gspo.rewards.base import RewardResult
from roll_gspo.rollout_files import SCHEMA, UPDATED_FOLDER, StepFile, read_columns, read_samples, rollout_files
from roll_gspo.tracking.rollouts import RolloutWriter, SampleBatch, TokenLists
from roll_gspo.tracking.token_texts import TokenTexts

LETTERS = "abcdefghijklmnop\ud83dqr"
ODD = {"id": "row 3", "source": "sums", "ground_truth": "half a character \ud83d"}


def decode(ids: object) -> str:
    return "".join(LETTERS[i] for i in ids)  # type: ignore[attr-defined]


def rollouts() -> Rollouts:
    """Return three groups of two samples; sample i has i + 1 tokens."""
    prompts = [Prompt((g, g + 1), decode((g, g + 1)), ODD if g == 2 else {"id": f"row {g}"}) for g in range(3)]
    completions = [
        Completion(tuple(range(i + 1)), tuple(-0.123456789 * (k + 1) for k in range(i + 1)), "stop") for i in range(6)
    ]
    completions[4] = replace(completions[4], version_runs=((9, 2), (11, 3)))
    return Rollouts.collate(prompts, [completions[:2], completions[2:4], completions[4:]], 0, 11)


def batch_of(with_text: list[int], trained: bool = True, first: int = 0) -> SampleBatch:
    whole = rollouts()
    values = whole.rollout_log_probs.clone()
    values[5, 0], values[5, 1] = math.nan, -math.inf
    advantages = torch.where(whole.sequences.response_mask, values + 1, 0.0)
    batch = TrainBatch(whole.sequences, torch.arange(6), advantages, values, values)
    results = [RewardResult(i / 2, None, "2", {"correct": 1.0}) for i in range(5)] + [RewardResult(0.0, "it hung")]
    return sample_batch(
        *(whole, ["maths"] * 6, results, TokenTexts(decode), with_text),
        batch if trained else None,
        first=first,
        version=12 if trained else None,
    )


def test_every_sample_has_ids_and_values_and_some_have_texts(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path / "rollouts")
    writer.write(12, [batch_of([4, 0])])
    writer.flush()
    (file,) = rollout_files(tmp_path / "rollouts")
    assert (file.step, file.path.name) == (12, "step_000012.parquet")
    read = read_samples(file.path)
    assert [s["sample"] for s in read.samples] == list(range(6)) and read.num_samples == 6
    assert set(read.samples[0]) == set(SCHEMA.names)
    assert [s["response"] for s in read.samples] == ["a", None, None, None, "abcde", None]
    fifth = read.samples[4]
    assert (fifth["id"], fifth["source"], fifth["domain"], fifth["group"]) == ("row 3", "sums", "maths", 2)
    assert fifth["ground_truth"] == "half a character \\ud83d" and fifth["prompt"] == "cd"
    assert fifth["response_tokens"] == list("abcde") and fifth["response_token_ids"] == [0, 1, 2, 3, 4]
    assert fifth["prompt_token_ids"] == [2, 3] and fifth["response_length"] == 5
    assert fifth["components"] == {"correct": 1.0} and (fifth["score"], fifth["weights_version"]) == (2.0, 9)
    assert fifth["version_runs"] == [{"version": 9, "tokens": 2}, {"version": 11, "tokens": 3}]
    assert [s["weights_version"] for s in read.samples] == [11, 11, 11, 11, 9, 11]
    assert [s["staleness"] for s in read.samples] == [1, 1, 1, 1, 3, 1]
    assert fifth["advantage"] == pytest.approx(1 - 0.123456789 * 3)
    assert fifth["rollout_log_probs"] == pytest.approx([-0.123456789 * k for k in range(1, 6)], rel=1e-6)
    failed = read.samples[5]
    assert (failed["score"], failed["failed"], failed["failure"]) == (None, True, "it hung")
    assert math.isnan(failed["old_log_probs"][0]) and failed["old_log_probs"][1] == -math.inf


def test_samples_with_texts_are_read_without_the_others(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path / "rollouts")
    writer.write(1, [batch_of([4, 0])])
    lists = TokenLists(np.array([-0.5, -1.0], np.float32), np.array([0, 1, 2]))
    writer.write_updated(1, [4, 1], lists)
    writer.close()
    path = tmp_path / "rollouts/step_000001.parquet"
    read = read_samples(path, with_text_only=True)
    assert [s["sample"] for s in read.samples] == [0, 4] and read.num_samples == 6
    assert [s.get("updated_log_probs") for s in read.samples] == [None, [-0.5]]
    assert read.num_bytes < read_samples(path).num_bytes
    assert read_columns(path, ["sample", "response_length"]) == {
        "sample": [4, 0, 1, 2, 3, 5],
        "response_length": [5, 1, 2, 3, 4, 6],
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rollouts", UPDATED_FOLDER]


def test_samples_without_a_training_batch_have_no_advantages(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path / "validation")
    writer.write(0, [batch_of([0], trained=False), batch_of([], trained=False, first=6)])
    writer.flush()
    samples = read_samples(tmp_path / "validation/step_000000.parquet").samples
    assert [s["sample"] for s in samples] == list(range(12))
    assert {(s["advantage"], s["old_log_probs"], s["staleness"]) for s in samples} == {(None, None, None)}


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Before staleness was recorded, `advantages` was the last column."""
    earlier = pa.schema([SCHEMA.field(name) for name in SCHEMA.names[: SCHEMA.names.index("advantages") + 1]])
    rows = [{"sample": 0, "response": "a", "weights_version": 3, "components": []}, {"sample": 1, "weights_version": 3}]
    path = tmp_path / "rollouts/step_000001.parquet"
    file = StepFile(path, earlier)
    file.add(pa.RecordBatch.from_pylist(rows, schema=earlier), row_group_size=1)
    file.complete()
    (sample,) = read_samples(path, with_text_only=True).samples
    assert (sample["response"], sample["weights_version"]) == ("a", 3) and "staleness" not in sample
    assert read_columns(path, ["sample", "staleness"]) == {"sample": [0, 1], "staleness": [None, None]}


def test_float_values_keep_six_digits() -> None:
    values = np.array([-0.123456789, 3e-10, 1e5, 0.0, -17.25], np.float32)
    (kept,) = TokenLists(values, np.array([0, 5])).array().to_pylist()
    assert kept == pytest.approx(values.tolist(), rel=1e-6)
    assert not np.array(kept, np.float32).view(np.uint32)[0] & 0xF, "the last bits are zero"


def test_token_lists_have_the_length_of_each_sample() -> None:
    mask = torch.tensor([[True, True, False], [False] * 3, [True] * 3])
    lists = token_lists_of(torch.arange(9).reshape(3, 3), mask)
    assert lists.array().to_pylist() == [[0, 1], [], [6, 7, 8]] and lists.values.dtype == np.int32


@pytest.mark.parametrize(
    ("limit", "traced", "expected"),
    [
        (None, [2, 3], [2, 3, 4, 5, 0, 1]),
        (4, [2, 3], [2, 3, 4, 0]),
        (3, [], [0, 1, 2]),
        (0, [2, 3], []),
    ],
)
def test_texts_of_traced_then_failed_then_first_samples(
    limit: int | None, traced: list[int], expected: list[int]
) -> None:
    results = [RewardResult(0.0)] * 4 + [RewardResult(0.0, "it hung"), RewardResult(0.0)]
    assert rows_with_text(rollouts(), results, limit, traced) == expected


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path)

    def batches():
        yield batch_of([0])
        raise RuntimeError("killed half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        writer.write(1, batches())
    writer.flush()
    assert list(tmp_path.iterdir()) == []


def test_error_of_the_disk_is_raised_before_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("a file, not a folder")
    writer = RolloutWriter(tmp_path / "rollouts")
    writer.write(7, [batch_of([0])])
    with pytest.raises(TrainingError, match=r"rollouts/step_000007\.parquet: cannot be written .*log_rollouts: false"):
        writer.flush()


def test_resume_removes_later_steps_and_leftovers_only(tmp_path: Path) -> None:
    folder, updated = tmp_path / "rollouts", tmp_path / UPDATED_FOLDER
    writer = RolloutWriter(folder)
    for step in (1, 2, 3):
        writer.write(step, [batch_of([])])
        writer.write_updated(step, [0], TokenLists(np.zeros(1, np.float32), np.array([0, 1])))
    writer.close()
    (folder / "step_000004.parquet.tmp").write_text("torn")
    (updated / "step_000002.parquet.tmp").write_text("torn")
    (folder / "step_notes.parquet").write_text("mine")
    RolloutWriter(folder, first_step=3)
    kept = ["step_000001.parquet", "step_000002.parquet"]
    assert sorted(p.name for p in updated.iterdir()) == kept
    assert sorted(p.name for p in folder.iterdir()) == [*kept, "step_notes.parquet"]


def test_large_steps_take_few_bytes_per_token(tmp_path: Path) -> None:
    """Token ids of a text, log-probs of two engines, and the same advantage for all tokens of a response."""
    count, length = 64, 512
    random = np.random.default_rng(0)
    offsets = np.arange(0, count * length + 1, length)
    rollout = -random.exponential(0.4, count * length).astype(np.float32)
    lists = {
        "response_token_ids": TokenLists((random.zipf(1.3, count * length) % 150_000).astype(np.int32), offsets),
        "rollout_log_probs": TokenLists(rollout, offsets),
        "old_log_probs": TokenLists(rollout * np.float32(1.001), offsets),
        "advantages": TokenLists(np.repeat(random.normal(size=count).astype(np.float32), length), offsets),
    }
    columns = {"sample": range(count), "group": [i // 8 for i in range(count)]}
    writer = RolloutWriter(tmp_path)
    writer.write(1, [SampleBatch(columns, ["p"] * count, [None] * count, lists, [], TokenTexts(decode))])
    writer.close()
    path = tmp_path / "step_000001.parquet"
    assert path.stat().st_size / (count * length) < 8
    assert parquet.read_table(path).column("response_token_ids").type == pa.list_(pa.int32())
