"""Ctrl-C, signals and full disks, on plain transformers."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import (
    REWARD,
    REWARD_MODULE,
    SIZES,
    Outcome,
    checkpoints_of,
    computed,
    metrics_of,
    rollouts_of,
    spawn,
)
from forked_command import train

pytestmark = pytest.mark.e2e

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
REWARD_ARGS = "rewards.column_addition.worker_args"
RUNS = Path("out/example_gspo")
CHANGED = "resume_with_changes=true"  # the first process had a reward that sends a signal
RESUME = ("resume_from_checkpoint=true", CHANGED)
IN_STEP_2 = 16 + 32 + 5  # number of a sample of step 2, after 16 samples of validation and 32 of step 1


def _interrupted(command: Command, small: tuple[str, ...], name: str, number: signal.Signals) -> Outcome:
    return command(*HF, *small, f"run_name={name}", f"{REWARD_ARGS}={{at: [{IN_STEP_2}], number: {number:d}}}")


@pytest.fixture(scope="module")
def interrupted(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was interrupted in step 2 and saved."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "my_reward.py").write_text(REWARD_MODULE)
    model = (f"pretrain={pretrained}", f"rewards.column_addition.worker_cls={REWARD}", "output_dir=out")
    stop = f"{REWARD_ARGS}={{at: [{IN_STEP_2}], number: {signal.SIGINT:d}}}"
    outcome = train(*HF, *SIZES, *model, stop, "run_name=interrupted", folder=folder)
    assert outcome.code == 128 + signal.SIGINT, outcome.err
    return folder / RUNS / "interrupted"


def test_interrupted_run_saves_and_resumes_to_the_same_result(command: Command, small: tuple[str, ...]) -> None:
    assert command(*HF, *small, "run_name=whole").code == 0
    for number in (signal.SIGINT, signal.SIGTERM):
        name = number.name
        outcome = _interrupted(command, small, name, number)
        assert outcome.code == 128 + number
        assert f"{name}: finishing this step and saving; once more stops at once" in outcome.out
        assert "step 2 of 4" in outcome.out and "resume_from_checkpoint=true" in outcome.out
        assert [row["step"] for row in metrics_of(RUNS / name)] == [0, 1, 2]
        assert checkpoints_of(RUNS / name) == ["step_000002"]
        resumed = command(*HF, *small, f"run_name={name}", *RESUME)
        assert resumed.code == 0 and "resumed after step 2" in resumed.out
        assert computed(RUNS / name) == computed(RUNS / "whole")
        assert rollouts_of(RUNS / name) == rollouts_of(RUNS / "whole")
        assert (RUNS / name / "report.html").is_file()
    finished = command(*HF, *small, "run_name=whole", "resume_from_checkpoint=true")
    assert finished.code == 0 and "resumed after step 4" in finished.out
    assert "nothing left to train: the checkpoint is of step 4, and the run has 4; raise max_steps" in finished.out
    assert len(metrics_of(RUNS / "whole")) == 5, "a finished run has no steps left"


def test_checkpoint_of_another_run_starts_a_new_folder(
    command: Command, small: tuple[str, ...], interrupted: Path
) -> None:
    shutil.copytree(interrupted, RUNS / "a")
    assert command(*HF, *small, "run_name=a", *RESUME).code == 0
    before = computed(RUNS / "a")
    outcome = command(*HF, *small, "run_name=b", f"resume_from_checkpoint={RUNS}/a/checkpoints/step_000002", CHANGED)
    assert outcome.code == 0
    assert computed(RUNS / "b") == before[3:], "steps 3 and 4 are repeated in the new folder"
    assert computed(RUNS / "a") == before
    refused = command(*HF, *small, "run_name=b", f"resume_from_checkpoint={RUNS}/a", CHANGED)
    assert refused.code == 2 and "holds the results of a run already" in refused.err


def test_newest_run_is_resumed_if_none_is_named(command: Command, small: tuple[str, ...], interrupted: Path) -> None:
    shutil.copytree(interrupted, RUNS / "old")
    assert command(*HF, *small, "run_name=new", "max_steps=2").code == 0
    outcome = command(*HF, *small, "resume_from_checkpoint=true", "max_steps=3")
    assert outcome.code == 0 and f"{RUNS}/new/checkpoints/step_000002" in outcome.out
    assert [path.name for path in sorted(RUNS.iterdir())] == ["new", "old"]


def test_resume_without_a_checkpoint_starts_from_the_beginning(command: Command, small: tuple[str, ...]) -> None:
    outcome = command(*HF, *small, "run_name=fresh", "resume_from_checkpoint=true", "max_steps=1")
    assert outcome.code == 0
    assert "no complete checkpoint was found; starting from the beginning" in outcome.out


def test_run_folder_with_results_is_not_overwritten(command: Command, small: tuple[str, ...]) -> None:
    assert command(*HF, *small, "run_name=done", "max_steps=1").code == 0
    before = {path: path.read_bytes() for path in RUNS.rglob("*") if path.is_file()}
    outcome = command(*HF, *small, "run_name=done")
    assert outcome.code == 2
    assert "choose another run_name, or go on with it: resume_from_checkpoint=true" in outcome.err
    assert {path: path.read_bytes() for path in RUNS.rglob("*") if path.is_file()} == before


def test_second_ctrl_c_stops_at_once(workplace: Path, small: tuple[str, ...]) -> None:
    twice = f"{{at: [{IN_STEP_2}, {IN_STEP_2 + 1}], number: {signal.SIGINT:d}, group: true}}"
    outcome = train(*HF, *small, "run_name=twice", f"{REWARD_ARGS}={twice}", folder=workplace)
    assert outcome.code == 130
    assert "finishing this step" in outcome.out and "stopped after step" not in outcome.out
    assert "stopped at once" in outcome.err and "Traceback" not in outcome.out + outcome.err
    assert checkpoints_of(workplace / RUNS / "twice") == []
    assert [row["step"] for row in metrics_of(workplace / RUNS / "twice")] == [0, 1]


def test_ctrl_c_during_start_up_stops_at_once(workplace: Path, small: tuple[str, ...]) -> None:
    (workplace / "eager.py").write_text(
        "import os, signal\nos.kill(os.getppid(), signal.SIGINT)\ndef f(*a, **k): ...\n"
    )
    outcome = spawn(*HF, *small, "rewards.column_addition={worker_cls: eager.f}", folder=workplace)
    assert outcome.code == 130, outcome.err
    assert "stopped at once" in outcome.err and "Traceback" not in outcome.out + outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kib", "message"),
    [(1024, "cannot be written"), (8, "File too large")],
    ids=["while saving", "while logging"],
)
def test_full_disk_keeps_the_last_checkpoint(
    command: Command, small: tuple[str, ...], workplace: Path, interrupted: Path, kib: int, message: str
) -> None:
    shutil.copytree(interrupted, RUNS / "full")
    checkpoint = RUNS / "full/checkpoints/step_000002"
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    # Without a tracker: the one of tensorboard writes in another thread, which prints its error.
    arguments = (*HF, *small, "run_name=full", "tracker=none", *RESUME)
    outcome = spawn(*arguments, folder=workplace, limits=f"-f {kib}")
    assert outcome.code == 1
    assert message in outcome.err and "Traceback" not in outcome.out + outcome.err
    assert checkpoints_of(RUNS / "full") == ["step_000002"]
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before
    # resumes once there is space
    assert command(*arguments).code == 0
    assert [row["step"] for row in metrics_of(RUNS / "full")] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_ctrl_c_in_a_multirun_saves_the_job_and_ends_the_sweep(workplace: Path, small: tuple[str, ...]) -> None:
    stop = f"{REWARD_ARGS}={{at: [{IN_STEP_2}], number: {signal.SIGINT:d}, group: true}}"
    outcome = train(*HF, *small, stop, "seed=1,2", "--multirun", folder=workplace)
    assert outcome.code == 130, outcome.err
    assert "stopped after step 2 of 4 and saved" in outcome.out and "Traceback" not in outcome.out + outcome.err
    (only,) = (workplace / RUNS).iterdir()
    assert only.name == "000_seed-1" and checkpoints_of(only) == ["step_000002"]
    again = train(*HF, *small, "seed=1,2", "--multirun", *RESUME, "max_steps=3", folder=workplace)
    assert again.code == 0, again.err
    assert "resumed after step 2" in again.out
    assert [[row["step"] for row in metrics_of(run)] for run in sorted((workplace / RUNS).iterdir())] == [
        [0, 1, 2, 3]
    ] * 2
