"""The staleness gate: what it decides, what a checkpoint keeps of it, and what a run does with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, metrics_of

from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.config.selection import StalenessGateConfig
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.pipelines.rlvr.staleness_gate import StalenessGate
from roll_gspo.pipelines.rlvr.state import RlvrState

Command = Callable[..., Outcome]
HF = ("--config-name", "example_gspo", "strategy=hf")
RUN = Path("out/example_gspo/run")
TWO_STEPS = ("max_steps=2", "run_name=run")


def gate(action: str) -> StalenessGate:
    return StalenessGate(StalenessGateConfig(min_ess=0.4, action=action))  # type: ignore[arg-type]


@pytest.mark.parametrize("action", ["wait", "skip", "stop"])
@pytest.mark.parametrize(("ess", "is_open"), [(1.0, True), (0.4, True), (0.39, False), (math.nan, False)])
def test_gate_is_closed_below_the_minimum(action: str, ess: float, is_open: bool) -> None:
    one = gate(action)
    reason = one.check(ess)
    assert (reason is None) == is_open and one.wants_fresh == (action == "wait" and not is_open)
    if reason is not None:
        assert "staleness_gate.min_ess 0.4" in reason and f"{ess:g}" in reason


def test_fresh_samples_are_wanted_until_the_value_recovers_also_after_a_resume() -> None:
    def state(action: str) -> RlvrState:
        sampler = PromptSampler(["a", "b"], seed=0)
        return RlvrState(0, sampler, RunningMoments(), None, gate(action))  # type: ignore[arg-type]

    original = state("wait")
    assert original.staleness_gate is not None
    original.staleness_gate.check(0.1)
    document = original.state_dict()
    for action, expected in (("wait", True), ("skip", False)):
        resumed = state(action)
        resumed.load_state_dict(document)
        assert resumed.staleness_gate is not None and resumed.staleness_gate.wants_fresh == expected
    original.staleness_gate.check(0.5)
    assert not original.staleness_gate.wants_fresh
    resumed = state("wait")
    resumed.load_state_dict({name: value for name, value in document.items() if name != "staleness_gate"})


def test_run_logs_its_gate_and_skips_the_update(command: Command, small: tuple[str, ...]) -> None:
    """Float32 engines differ by rounding, so that the effective sample size is a little below 1."""
    outcome = command(*HF, *small, *TWO_STEPS, "staleness_gate={min_ess: 1.0, action: skip}")
    assert outcome.code == 0, outcome.err
    assert "is below staleness_gate.min_ess 1; the update is skipped" in outcome.out
    for row in metrics_of(RUN)[1:]:
        assert row["staleness/gate_closed"] == 1 and 0.999 < row["staleness/ess"] < 1
        assert (row["actor/num_updates"], row["actor/skipped_updates"]) == (0, 4)
        assert "staleness/mean" not in row, "nothing is stale"


def test_run_that_the_gate_stops_is_saved_and_fails(command: Command, small: tuple[str, ...]) -> None:
    outcome = command(*HF, *small, *TWO_STEPS, "staleness_gate={min_ess: 1.0, action: stop}")
    assert outcome.code == 1
    assert "step 1: staleness/ess 1 is below staleness_gate.min_ess 1; the run was stopped" in outcome.out
    assert [row["actor/num_updates"] for row in metrics_of(RUN)[1:]] == [0]
    assert (RUN / "checkpoints/step_000001").is_dir()


def test_open_gate_changes_nothing_but_its_metrics(command: Command, small: tuple[str, ...]) -> None:
    outcome = command(*HF, *small, *TWO_STEPS, "staleness_gate={action: stop, level: geometric}")
    assert outcome.code == 0, outcome.err
    assert [row["staleness/gate_closed"] for row in metrics_of(RUN)[1:]] == [0, 0]
