"""Checkpoints that are written while training continues."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, checkpoints_of, computed, metrics_of, spawn

pytestmark = pytest.mark.e2e

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
MEGATRON = "actor_train.strategy_args.strategy_name=megatron_train"
ASYNCHRONOUS = "checkpoint_config.async_save=true"
RUNS = Path("out/example_gspo")


@pytest.mark.parametrize("engine", ["hf", pytest.param("megatron", marks=[pytest.mark.megatron, pytest.mark.long])])
def test_asynchronous_save_changes_neither_metrics_nor_checkpoints(
    command: Command, small: tuple[str, ...], engine: str
) -> None:
    arguments = (*HF, *small, "save_steps=1", "max_steps=3", *([MEGATRON] if engine == "megatron" else []))
    assert command(*arguments, "run_name=synchronous").code == 0
    assert command(*arguments, "run_name=asynchronous", ASYNCHRONOUS).code == 0
    assert computed(RUNS / "asynchronous") == computed(RUNS / "synchronous")
    assert (
        checkpoints_of(RUNS / "asynchronous") == checkpoints_of(RUNS / "synchronous") == ["step_000002", "step_000003"]
    )
    shutil.rmtree(RUNS / "asynchronous/checkpoints/step_000003")
    outcome = command(*arguments, "run_name=asynchronous", ASYNCHRONOUS, "resume_from_checkpoint=true")
    assert outcome.code == 0 and "resumed after step 2" in outcome.out
    assert computed(RUNS / "asynchronous") == computed(RUNS / "synchronous")
    assert checkpoints_of(RUNS / "asynchronous") == ["step_000002", "step_000003"]


@pytest.mark.long
@pytest.mark.parametrize("engine", ["hf", pytest.param("megatron", marks=pytest.mark.megatron)])
def test_full_disk_during_an_asynchronous_save_keeps_the_last_checkpoint(
    command: Command, small: tuple[str, ...], workplace: Path, engine: str
) -> None:
    """The file size limit is below the actor's state and above all other files."""
    arguments = (*HF, *small, "save_steps=1", "run_name=full", *([MEGATRON] if engine == "megatron" else []))
    small_export = "actor_train.training_args.save_hf_model=false"
    assert command(*arguments, small_export, "max_steps=1", "eval_steps=1").code == 0
    arguments = (*arguments, small_export, ASYNCHRONOUS, "resume_from_checkpoint=true")
    outcome = spawn(*arguments, folder=workplace, limits="-f 400")
    assert outcome.code == 1
    assert "cannot be written" in outcome.err
    if engine == "megatron":  # torch.save raises another message
        assert "rank 0: [Errno 27] File too large" in outcome.err
    assert "Earlier checkpoints are untouched" in outcome.err and "Traceback" not in outcome.out + outcome.err
    assert checkpoints_of(RUNS / "full") == ["step_000001"]
    assert command(*arguments).code == 0
    assert [row["step"] for row in metrics_of(RUNS / "full")] == [0, 1, 2, 3, 4]
