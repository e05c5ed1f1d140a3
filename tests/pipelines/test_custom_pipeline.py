"""A pipeline from outside the package: the documented example, through the command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import REWARD, Outcome, checkpoints_of, computed, metrics_of
from test_docs import files

Command = Callable[..., Outcome]
NAMES = ("best_of_n/__init__.py", "best_of_n/steps.py", "best_of_n.yaml")
SAMPLES_BEFORE_STEP_2 = 16 + 32  # of the validation and of step 1
RUNS = Path("out/best_of_n")


@pytest.fixture
def arguments(workplace: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Arguments of a small run of the documented files."""
    documented = files()
    for name in NAMES:
        path = workplace / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(documented[name])
    monkeypatch.syspath_prepend(workplace)
    yield ("--config-dir", ".", "--config-name", "best_of_n", "strategy=hf", *small)
    for module in [name for name in sys.modules if name.partition(".")[0] == "best_of_n"]:
        del sys.modules[module]


def test_plan_has_the_rows_of_a_custom_pipeline(command: Command, arguments: tuple[str, ...]) -> None:
    outcome = command(*arguments, "num_best=3", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "the best 3 of 4 responses" in outcome.out
    assert "best_of_n.steps" not in sys.modules, "the plan imports no torch"


def test_key_of_a_custom_pipeline_is_validated(command: Command, arguments: tuple[str, ...]) -> None:
    wrong = command(*arguments, "num_best=0", "--dry-run")
    assert wrong.code == 2 and "num_best" in wrong.err
    foreign = command(*arguments, "num_epochs=1", "--dry-run")
    assert foreign.code == 2 and "num_epochs" in foreign.err and "sft" in foreign.err


@pytest.mark.parametrize(
    ("path", "key"),
    [("rlwr", "pipeline: "), ("best_of_m.BestOfN", "pipeline: "), ("best_of_n.BestOfM", "pipeline: ")],
)
def test_unknown_pipeline_is_refused(command: Command, arguments: tuple[str, ...], path: str, key: str) -> None:
    outcome = command(*arguments, f"pipeline={path}", "--dry-run")
    assert outcome.code == 2 and key in outcome.err and path.rpartition(".")[2] in outcome.err


AGAIN = ("run_name=stopped", "resume_from_checkpoint=true", "resume_with_changes=true")  # without the signal


def test_interrupted_run_of_a_custom_pipeline_resumes_bit_for_bit(command: Command, arguments: tuple[str, ...]) -> None:
    whole = command(*arguments, "max_steps=3", "save_steps=3", "run_name=whole")
    assert whole.code == 0, whole.err
    rows = metrics_of(RUNS / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["actor/num_updates"] == 4 and row["time/update"] > 0 for row in rows[1:])
    assert rows[0]["validation/num_samples"] == 16 and "validation/score_mean" in rows[3]

    signalled = f"{{at: [{SAMPLES_BEFORE_STEP_2 + 5}], number: {signal.SIGINT:d}}}"
    reward = f"rewards.column_addition={{worker_cls: {REWARD}, worker_args: {signalled}}}"
    stopped = command(*arguments, "max_steps=3", "save_steps=3", "run_name=stopped", reward)
    assert stopped.code == 128 + signal.SIGINT, stopped.err
    assert checkpoints_of(RUNS / "stopped") == ["step_000002"]
    resumed = command(*arguments, "max_steps=3", "save_steps=3", *AGAIN)
    assert resumed.code == 0, resumed.err
    assert computed(RUNS / "stopped") == computed(RUNS / "whole")
    ends = [RUNS / name / "checkpoints/step_000003/actor_train_hf/model.safetensors" for name in ("whole", "stopped")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
