"""Resume runs whose generation is ahead of training: no prompt is lost, and none is trained twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, computed, ids_by_step, metrics_of, rollouts_of

from roll_gspo.checkpoint import HF_EXPORT
from roll_gspo.pipelines.rlvr.rollout_state import STREAM

pytestmark = pytest.mark.e2e

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
RUNS = Path("out/example_gspo")
NUM_GROUPS, NUM_STEPS = 8, 6
LENGTH = (f"max_steps={NUM_STEPS}", "save_steps=3")


def _resumed_after_step_3(command: Command, *arguments: str) -> None:
    """Train the run `whole`, and resume a copy of it from its first checkpoint as the run `again`."""
    outcome = command(*HF, *arguments, *LENGTH, "run_name=whole")
    assert outcome.code == 0, outcome.out + outcome.err
    shutil.copytree(RUNS / "whole", RUNS / "again")
    shutil.rmtree(RUNS / "again/checkpoints/step_000006")
    assert (RUNS / "again/checkpoints/step_000003" / STREAM).is_file(), "groups are in flight"
    outcome = command(*HF, *arguments, *LENGTH, "run_name=again", "resume_from_checkpoint=true")
    assert outcome.code == 0 and "resumed after step 3" in outcome.out, outcome.out + outcome.err


def test_one_step_off_resumes_to_the_same_result(command: Command, small: tuple[str, ...]) -> None:
    ahead = ("async_generation_ratio=2",)
    _resumed_after_step_3(command, *small, *ahead)
    assert computed(RUNS / "again") == computed(RUNS / "whole")
    assert rollouts_of(RUNS / "again") == rollouts_of(RUNS / "whole")
    one, other = (
        RUNS / run / "checkpoints/step_000006" / HF_EXPORT / "model.safetensors" for run in ("again", "whole")
    )
    assert one.read_bytes() == other.read_bytes()
    rows = metrics_of(RUNS / "whole")[1:]
    assert [row["staleness/max"] for row in rows] == [0, 1, 2, 2, 2, 2]


@pytest.mark.slow
def test_in_flight_trains_every_prompt_once(command: Command, small: tuple[str, ...]) -> None:
    ahead = ("execution=ray", "async_generation_ratio=2", "async_mode=in_flight")
    _resumed_after_step_3(command, *small, *ahead)
    whole, again = ids_by_step(RUNS / "whole"), ids_by_step(RUNS / "again")
    assert [again[step] for step in (1, 2, 3)] == [whole[step] for step in (1, 2, 3)]
    for trained in (whole, again):
        assert {step: len(ids) for step, ids in trained.items()} == dict.fromkeys(range(1, NUM_STEPS + 1), NUM_GROUPS)
        assert len(set().union(*trained.values())) == NUM_GROUPS * NUM_STEPS, "none is trained twice"
    assert set().union(*whole.values()) == set().union(*again.values()), "none is lost"
    assert all(row["staleness/max"] <= 2 for run in ("whole", "again") for row in metrics_of(RUNS / run)[1:])
