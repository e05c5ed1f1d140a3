"""Properties of the staleness scheduler for any order of events, and its cost."""

from __future__ import annotations

import json
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from roll_gspo.errors import CheckpointError
from roll_gspo.scheduling.staleness import StalenessScheduler


class Machine(RuleBasedStateMachine):
    """Starts, finishes, drops, restarts and trains groups in any order, and reloads the state at any time."""

    @initialize(size=st.integers(1, 4), bound=st.integers(0, 4), in_order=st.booleans())
    def setup(self, size: int, bound: int, in_order: bool) -> None:
        self.size, self.bound, self.in_order = size, bound, in_order
        self.scheduler = StalenessScheduler(size, bound, in_order)
        self.versions: dict[int, int] = {}  # of untrained groups, by their last start
        self.done: set[int] = set()
        self.trained: list[int] = []

    @rule(count=st.integers(1, 8))
    def start(self, count: int) -> None:
        for _ in range(min(count, self.scheduler.num_startable())):
            number = self.scheduler.start()
            assert number not in self.versions
            assert number not in self.trained
            self.versions[number] = self.scheduler.version

    @rule(data=st.data(), count=st.integers(1, 8))
    def finish(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            if running := sorted(self.versions.keys() - self.done):
                number = data.draw(st.sampled_from(running))
                self.scheduler.finish(number)
                self.done.add(number)

    @rule(data=st.data(), restarts=st.booleans())
    def discard(self, data: st.DataObject, restarts: bool) -> None:
        version = self.scheduler.version
        groups = sorted(g for g, started in self.versions.items() if not self.in_order or started == version)
        if not groups:
            return
        number = data.draw(st.sampled_from(groups))
        self.done.discard(number)
        if restarts:
            self.scheduler.restart(number)
            self.versions[number] = version
        else:
            self.scheduler.drop(number)
            del self.versions[number]

    @rule()
    def train(self) -> None:
        batch = self.scheduler.batch()
        if batch is not None and self.scheduler.can_update():
            self.train_batch(batch)

    @rule()
    def reload(self) -> None:
        state = json.loads(json.dumps(self.scheduler.state_dict()))
        self.scheduler = StalenessScheduler(self.size, self.bound, self.in_order)
        self.scheduler.load_state_dict(state)
        assert self.scheduler.state_dict() == state

    @rule()
    def everything_finishes(self) -> None:
        """There is no deadlock: once all groups are started and finished, training continues."""
        self.start(self.scheduler.num_startable())
        for number in sorted(self.versions.keys() - self.done):
            self.scheduler.finish(number)
            self.done.add(number)
        batch = self.scheduler.batch()
        assert batch is not None
        assert self.scheduler.can_update()
        self.train_batch(batch)

    @invariant()
    def counts(self) -> None:
        assert len(self.versions) + self.scheduler.num_startable() == (self.bound + 1) * self.size
        assert len(self.versions) <= (self.bound + 1) * self.size
        assert self.scheduler.unfinished == sorted(self.versions.keys() - self.done)
        assert self.scheduler.finished == sorted(self.done)

    def train_batch(self, batch: list[int]) -> None:
        version = self.scheduler.version
        assert len(set(batch)) == self.size
        assert set(batch) <= self.done
        assert all(0 <= version - self.versions[group] <= self.bound for group in batch)
        if self.in_order:
            assert batch == list(range(version * self.size, (version + 1) * self.size))
            assert {self.versions[group] for group in batch} == {max(0, version - self.bound)}
        self.scheduler.train(batch)
        self.trained += batch
        self.done -= set(batch)
        for group in batch:
            del self.versions[group]
        assert self.scheduler.version == version + 1


def test_any_order_of_events() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=100, stateful_step_count=40, deadline=None))


@pytest.mark.parametrize("in_order", [True, False])
def test_zero_staleness_is_synchronous(in_order: bool) -> None:
    scheduler = StalenessScheduler(2, 0, in_order)
    for version in range(3):
        groups = [scheduler.start(), scheduler.start()]
        assert groups == [2 * version, 2 * version + 1]
        assert scheduler.num_startable() == 0
        scheduler.finish(groups[1])
        assert scheduler.batch() is None
        scheduler.finish(groups[0])
        assert scheduler.batch() == groups
        assert scheduler.can_update()
        scheduler.train(groups)


def test_batch_waits_for_groups_that_would_miss_their_deadline() -> None:
    scheduler = StalenessScheduler(2, 1, in_order=False)
    for _ in range(4):
        scheduler.start()  # 0 to 3 belong into the batches of versions 0 and 1
    for group in (2, 3):
        scheduler.finish(group)
    assert scheduler.batch() == [2, 3]
    scheduler.train([2, 3])
    assert [scheduler.start(), scheduler.start()] == [4, 5]
    for group in (4, 5):
        scheduler.finish(group)
    assert scheduler.batch() is None  # 0 and 1 are due at version 1
    scheduler.finish(0)
    assert scheduler.batch() is None
    with pytest.raises(ValueError, match="version 1"):
        scheduler.train([0, 4])
    scheduler.restart(1)
    assert scheduler.deadline(1) == 2
    assert scheduler.started_at(1) == 1
    assert scheduler.batch() == [0, 4]


def test_in_order_weights_wait_for_groups_in_flight() -> None:
    scheduler = StalenessScheduler(1, 1, in_order=True)
    assert [scheduler.start(), scheduler.start()] == [0, 1]
    scheduler.finish(0)
    assert scheduler.batch() == [0]
    assert not scheduler.can_update()
    scheduler.finish(1)
    scheduler.drop(1)  # e.g. without spread: another prompt takes its number
    assert not scheduler.can_update()
    assert scheduler.start() == 1
    scheduler.finish(1)
    scheduler.train([0])
    with pytest.raises(ValueError, match="version 1"):
        scheduler.drop(1)


def test_state_must_fit() -> None:
    scheduler = StalenessScheduler(2, 2, in_order=False)
    for _ in range(6):
        scheduler.finish(scheduler.start())
    state = scheduler.state_dict()
    StalenessScheduler(2, 4, in_order=False).load_state_dict(state)
    for smaller, key in ((StalenessScheduler(2, 1, False), "max_staleness"), (StalenessScheduler(3, 2, False), "per")):
        with pytest.raises(CheckpointError, match=key):
            smaller.load_state_dict(state)


def test_misuse_is_refused() -> None:
    scheduler = StalenessScheduler(1, 0, in_order=False)
    group = scheduler.start()
    with pytest.raises(ValueError, match="untrained"):
        scheduler.start()
    with pytest.raises(ValueError, match="finished groups"):
        scheduler.train([group])
    scheduler.finish(group)
    with pytest.raises(ValueError, match="finished already"):
        scheduler.finish(group)


def _operations(scheduler: StalenessScheduler, steps: int) -> int:
    """Run steps and return the number of calls of the scheduler."""
    running: deque[int] = deque()
    calls = 0
    for _ in range(steps):
        while scheduler.num_startable():
            running.append(scheduler.start())
            calls += 1
        while (batch := scheduler.batch()) is None:
            scheduler.finish(running.popleft())
            calls += 2
        scheduler.train(batch)
        calls += 1
    return calls


def test_many_groups_in_flight() -> None:
    """4,096 groups per step and a ratio of 8: no operation scans the 36,864 groups."""
    scheduler = StalenessScheduler(4096, 8, in_order=False)
    assert _operations(scheduler, 2) == 9 * 4096 + 4096 + 2 * 2 * 4096 + 2
    assert scheduler.version == 2
