"""The command that simulates clusters: sources of its settings, its output, and its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from composed import load_config

from roll_gspo import simulate
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.rollout_files import SCHEMA, StepFile, step_path

# Equal lengths of 100 tokens at 10 ms: generation takes 1 s. The trainer of one GPU takes 2 s for 4 * 100 tokens.
SMALL = (
    *("--gpus", "2", "--split", "0.5", "--groups", "2", "--samples", "2", "--median", "100", "--sigma", "0"),
    *("--request-ms", "0", "--train-tokens-per-s", "200", "--sync-s", "0.5", "--steps", "3"),
)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["simulate", *arguments])
    try:
        simulate.main()
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        return exit.code
    return 0


def rows_of(text: str) -> list[dict[str, Any]]:
    """Return the rows of --json."""
    return json.loads(text)["rows"]


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, *SMALL, "--staleness", "0,1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "log-normal: median 100, sigma 0, at most 8192 tokens" in lines[1]
    assert lines[-2].split() == ["2", "1", "1", "0", "3.5", "29%", "57%", "1.1", "114", "0:", "100%"]
    assert lines[-1].split() == ["2", "1", "1", "1", "2.5", "0%", "40%", "1.6", "160", "1:", "100%", "*"]


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, *SMALL, "--staleness", "2", "--mode", "in_flight", "--json") == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert (row["gpus"], row["train_gpus"], row["engines"], row["staleness"]) == (2, 1, 1, 2)
    assert row["result"]["step_s"] == pytest.approx(2.5)
    assert row["result"]["staleness"] == {"2": 1.0}


def test_gpus_are_split_into_whole_engines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--gpus", "8,16", "--split", "0.1,0.5,0.9", "--engine-gpus", "4", "--staleness", "0", "--json")
    assert command(monkeypatch, *SMALL[4:], *sizes) == 0
    split = [(row["gpus"], row["train_gpus"], row["engines"]) for row in rows_of(capsys.readouterr().out)]
    assert split == [(8, 4, 1), (16, 12, 1), (16, 8, 2), (16, 4, 3)]


def test_configuration_sets_batches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("execution=ray", "rollout_batch_size=16", "async_generation_ratio=3", "async_mode=in_flight")
    config = load_config("example_gspo", *overrides, "response_length=40").config
    assert isinstance(config, ExperimentConfig)
    options = simulate.make_parser().parse_args(["--gpus", "2", "--samples", "5"])
    settings = simulate.complete_settings(options, config)
    assert (settings.groups, settings.samples, settings.max_tokens, settings.median) == (16, 5, 40, 2)
    assert (settings.staleness, settings.mode, settings.partial) == ((3,), "in_flight", "continue")


def test_lengths_of_a_run_are_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, lengths in ((1, [100, 50, 0, 100]), (2, [100, 100, 20, 30])):
        columns = {"sample": range(4), "group": [0, 0, 1, 1], "response_length": lengths}
        arrays = [
            pa.array(columns[n], t) if n in columns else pa.nulls(4, t)
            for n, t in zip(SCHEMA.names, SCHEMA.types, strict=True)
        ]
        file = StepFile(step_path(tmp_path / "rollouts", step))
        file.add(pa.record_batch(arrays, schema=SCHEMA))
        file.complete()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rollout/prompt_length_mean": 25}\n')
    options = simulate.make_parser().parse_args(["--run", str(tmp_path)])
    settings = simulate.complete_settings(options, None)
    assert settings.recorded == ((100, 50), (1, 100), (100, 100), (20, 30))
    assert (settings.groups, settings.prompt_tokens) == (2, 25)
    sizes = ("--gpus", "2", "--split", "0.5", "--request-ms", "0", "--sync-s", "0", "--staleness", "0", "--steps", "2")
    speed = ("--train-tokens-per-s", "100", "--json", "--prompt-tokens", "0")
    assert command(monkeypatch, "--run", str(tmp_path), *sizes, *speed) == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert row["result"]["step_s"] == pytest.approx(1.0 + (251 + 250) / 100 / 2)
    assert command(monkeypatch, "--run", str(tmp_path), "--median", "5") == 2
    assert "--median: no effect with --run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--medain", "3"), "--medain: unknown option; did you mean '--median'?"),
        (("--split", "1"), "--split: '1' leaves no GPU to the trainer"),
        (("--gpus", "8,x"), "--gpus: 'x' is not a whole number of at least 1"),
        (("--step-ms", "nan"), "--step-ms: 'nan' is not a number above 0"),
        (("--gpus", "8", "--engine-gpus", "8"), "--gpus: 8 cannot hold an engine of 8 and a trainer; give 9"),
        (("--median", "9000"), "--median: 9000 exceeds the limit of 8192 tokens"),
        (("--partial", "drop"), "--partial: drop needs weights that change in flight; add --mode in_flight"),
        (("--run", "nowhere"), "--run: nowhere has no rollouts/step_*.parquet"),
        (("--config-nam", "x"), "--config-nam: unknown option; did you mean '--config-name'?"),
        (("--multirun", "--config-name", "example_gspo"), "--multirun"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert problem in capsys.readouterr().err
