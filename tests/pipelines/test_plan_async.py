"""Rows of the plan about asynchronous training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from composed import load_config

from roll_gspo.pipelines.plan import make_plan

RAY = ("execution=ray", "async_generation_ratio=1")


def async_rows(*overrides: str) -> list[str]:
    """The texts of the rows `async`."""
    return [text for label, text in make_plan(load_config("example_gspo", *overrides).config).rows if label == "async"]


def earlier_run(folder: Path, name: str, generation: float, **config: int) -> None:
    """Write the files of a run that took `generation` and 2 s per step."""
    run = folder / "example_gspo" / name
    run.mkdir(parents=True)
    sizes = {"rollout_batch_size": 32, "num_return_sequences_in_group": 8, **config}
    (run / "config.yaml").write_text(json.dumps(sizes))
    row = {"step": 1, "time/generate": generation, "time/update": 1.5, "time/old_log_probs": 0.5}
    (run / "metrics.jsonl").write_text('{"step": 0}\n' + json.dumps(row) + "\n")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_synchronous_plan_has_no_row() -> None:
    assert async_rows() == []
    assert async_rows("execution=ray") == []


def test_without_measurements_the_assumption_is_named() -> None:
    limit, side, source, _ = async_rows(*RAY)
    assert limit == "one_step_off: trained tokens are at most 1 step(s) old"
    assert re.fullmatch(r"idle: the trainer [45]\d% of the time; a step takes about 0\.6\d × a synchronous one", side)
    assert source.startswith("assumed: generation takes 2 × as long as training")


def test_local_execution_saves_no_time() -> None:
    _, text = async_rows("async_generation_ratio=1")
    assert text.startswith("execution: local generates and trains in turn")


def test_partial_rollouts_are_named() -> None:
    limit, *_ = async_rows(*RAY, "async_mode=in_flight", "partial_rollouts=drop")
    assert limit == "in_flight: trained tokens are at most 1 step(s) old, unfinished responses: drop"


def test_earlier_run_of_the_experiment_is_used(tmp_path: Path) -> None:
    earlier_run(tmp_path / "runs", "other_batch", 50.0, rollout_batch_size=64)
    earlier_run(tmp_path / "runs", "asynchronous", 50.0, async_generation_ratio=1)
    folder = f"output_dir={tmp_path / 'runs'}"
    assert async_rows(*RAY, folder)[2].startswith("assumed")
    earlier_run(tmp_path / "runs", "first", 0.5)
    _, side, source, lengths = async_rows(*RAY, folder)
    assert source == f"measured in {tmp_path}/runs/example_gspo/first: generation 0.5 s, training 2 s"
    assert lengths.startswith("assumed: long-tailed lengths")
    assert re.fullmatch(r"idle: engines 7\d% of the time; a step takes about 0\.8\d × a synchronous one", side)
