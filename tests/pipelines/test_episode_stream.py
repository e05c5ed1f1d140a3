"""Groups of episodes in flight: weights that change meanwhile, and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from episode_cases import ECHO, ENVIRONMENTS, NUM_TURNS, REWARD, assert_exact
from rollout_cases import DOMAINS, Batch, Run, states, stream_settings

from roll_gspo.pipelines.rlvr.rollout_stream import CONTINUED, DROPPED, RESTARTED
from roll_gspo.roles.environment_manager import EnvironmentManager, EnvironmentSettings
from roll_gspo.roles.episodes import EpisodeLimits

NUM_STEPS = 5
LIMITS = EpisodeLimits(NUM_TURNS, max_prompt_tokens=99, max_tokens=200, max_turn_tokens=5, timeout_s=100.0)


@pytest.fixture(scope="module")
def environments() -> Iterator[EnvironmentManager]:
    """Environments that all runs of this module share."""
    settings = EnvironmentSettings(ECHO, (), LIMITS, LIMITS, 1, 1, 64, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ENVIRONMENTS)
        manager = EnvironmentManager(dict.fromkeys(DOMAINS, settings))
        yield manager
        manager.close()


def assert_trained_once(batches: list[Batch], max_staleness: int) -> None:
    """Check every token of every batch, and that no draw is trained twice."""
    draws = [group.draw for batch in batches for group in batch.groups]
    assert len(draws) == len(set(draws)) == 4 * len(batches)
    for batch in batches:
        assert batch.step - 1 - max_staleness <= min(batch.versions) <= max(batch.versions) <= batch.step - 1
        for group in batch.groups:
            assert {result.score for result in group.results.values()} == {REWARD}
            for sample, completion in group.completions.items():
                assert_exact(completion, group.seeds[sample])


@pytest.mark.parametrize("partial_rollouts", ["continue", "restart", "drop"])
def test_weights_change_during_episodes(environments: EnvironmentManager, partial_rollouts: str) -> None:
    chosen = stream_settings(2, NUM_STEPS, in_flight=True, partial_rollouts=partial_rollouts)
    run = Run(chosen, capacity=6, environments=environments)
    batches = run.train_all()
    assert_trained_once(batches, max_staleness=2)
    completions = [c for batch in batches for group in batch.groups for c in group.completions.values()]
    num_continued = sum(len(completion.version_runs) > 1 for completion in completions)
    counts = {name: run.stream.take_count(name) for name in (CONTINUED, RESTARTED, DROPPED)}
    expected = {"continue": CONTINUED, "restart": RESTARTED, "drop": DROPPED}[partial_rollouts]
    assert [name for name, number in counts.items() if number] == [expected]
    assert num_continued == counts[CONTINUED]
    draws = {group.draw for batch in batches for group in batch.groups}
    assert (draws == set(range(4 * NUM_STEPS))) == (partial_rollouts != "drop"), "no row is lost, unless it is dropped"


def test_checkpoint_keeps_finished_episodes_and_restarts_others(
    environments: EnvironmentManager, tmp_path: Path
) -> None:
    chosen = stream_settings(1, NUM_STEPS, in_flight=True)
    run = Run(chosen, capacity=6, environments=environments)
    batches = [run.train(), run.train()]
    run.wait(lambda: any(group.completions and not group.is_scored for group in run.stream.groups.values()))
    kept = {slot: dict(group.completions) for slot, group in run.stream.groups.items()}
    assert run.stream.num_generating and run.stream.partials() == {}
    run.save(tmp_path / "saved")
    run.stream.close()
    resumed = Run(chosen, order=1, environments=environments)
    resumed.load(tmp_path / "saved")
    assert {slot: dict(group.completions) for slot, group in resumed.stream.groups.items()} == kept
    groups = dict(resumed.stream.groups)
    batches += resumed.train_all()
    assert_trained_once(batches, max_staleness=1)
    assert {group.draw for batch in batches for group in batch.groups} == set(range(4 * NUM_STEPS)), "none is lost"
    for slot, found in kept.items():
        assert {sample: groups[slot].completions[sample] for sample in found} == found, "played once"


def test_stream_in_order_resumes_bit_for_bit(environments: EnvironmentManager, tmp_path: Path) -> None:
    chosen = stream_settings(1, NUM_STEPS)
    run = Run(chosen, environments=environments)
    batches = [run.train(), run.train()]
    run.wait(lambda: any(group.completions and not group.is_scored for group in run.stream.groups.values()))
    run.save(tmp_path / "saved")
    batches += run.train_all()
    assert_trained_in_order(batches)
    resumed = Run(chosen, order=1, environments=environments)
    resumed.load(tmp_path / "saved")
    assert states(resumed.train_all()) == states(batches[2:])


def assert_trained_in_order(batches: list[Batch]) -> None:
    """Check every token of every batch, and that each has one version."""
    for batch in batches:
        assert [group.draw for group in batch.groups] == list(range(4))
        assert batch.versions == {max(0, batch.step - 2)}
        for group in batch.groups:
            for sample, completion in group.completions.items():
                assert_exact(completion, group.seeds[sample])
