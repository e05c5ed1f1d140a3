"""Simulation of generation and training with a virtual clock, through the scheduler of real runs.

Event-driven: the events are completed responses, completed training steps and completed weight transfers. Prefill,
rewards, validation and checkpoints take no time.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from roll_gspo.scheduling.assignment import EngineLoads
from roll_gspo.scheduling.engine import DecodeEngine, Request
from roll_gspo.scheduling.lengths import Lengths
from roll_gspo.scheduling.staleness import StalenessScheduler

_TRAINER = -1  # in events, instead of the number of an engine


@dataclass(frozen=True)
class Cluster:
    """Speed of engines and trainer.

    Attributes:
        engines: number of engines.
        capacity: requests that an engine decodes at the same time.
        step_s, step_s_per_request: a decode step of an engine with r requests takes `step_s + r * step_s_per_request`
            seconds.
        trained_tokens_per_s: tokens per second of the trainer as a whole, prompts included.
        sync_s: seconds of a weight transfer; engines and trainer wait for it.
    """

    engines: int
    capacity: int
    step_s: float
    step_s_per_request: float
    trained_tokens_per_s: float
    sync_s: float


@dataclass(frozen=True)
class Schedule:
    """Batches and their staleness.

    Attributes:
        groups_per_step: groups per training step.
        prompt_tokens: tokens of a prompt; they are trained, but take no time to generate.
        max_staleness: `async_generation_ratio`.
        mode: `async_mode`.
        partial_rollouts: treatment of unfinished groups at a weight update in the mode `in_flight`.
    """

    groups_per_step: int
    prompt_tokens: float
    max_staleness: int
    mode: Literal["one_step_off", "in_flight"]
    partial_rollouts: Literal["continue", "restart", "drop"]


@dataclass(frozen=True)
class Simulated:
    """Result of a simulation without its first steps. A weight transfer counts as work of both sides.

    Attributes:
        step_s: mean seconds per step.
        trainer_idle: share of time in which the trainer waits for a batch or for the engines.
        engines_idle: share of time in which an engine has no request, averaged over the engines.
        running: mean number of requests of an engine.
        tokens_per_s: trained response tokens per second.
        discarded: share of the sampled tokens that were discarded with restarted or dropped groups.
        staleness: share of the trained tokens by their staleness.
    """

    step_s: float
    trainer_idle: float
    engines_idle: float
    running: float
    tokens_per_s: float
    discarded: float
    staleness: Mapping[int, float]


def simulate(cluster: Cluster, schedule: Schedule, lengths: Lengths, steps: int, warm_up: int) -> Simulated:
    """Simulate `warm_up` steps, then measure `steps` steps. Engines are not yet as full in the first steps as later."""
    simulation = _Simulation(cluster, schedule, lengths)
    simulation.run(warm_up)
    before = simulation.totals()
    simulation.run(steps)
    return _result(cluster, steps, before, simulation.totals())


@dataclass
class _Totals:
    """Sums since the start of a simulation."""

    time: float = 0.0
    training_s: float = 0.0
    sync_s: float = 0.0
    busy_s: float = 0.0
    request_s: float = 0.0
    discarded: float = 0.0
    tokens: dict[int, float] = field(default_factory=dict)  # trained response tokens by their staleness


@dataclass
class _Group:
    """A started group: the lengths of its responses, and (version, tokens) of the complete ones."""

    lengths: Sequence[int]
    unfinished: int
    tokens: list[tuple[int, float]] = field(default_factory=list)


class _Simulation:
    """The state of engines, trainer and scheduler at a time."""

    def __init__(self, cluster: Cluster, schedule: Schedule, lengths: Lengths) -> None:
        self._cluster, self._schedule = cluster, schedule
        self._lengths = lengths.groups()
        size, in_order = schedule.groups_per_step, schedule.mode == "one_step_off"
        self._scheduler = StalenessScheduler(size, schedule.max_staleness, in_order)
        self._engines = [DecodeEngine(cluster.step_s, cluster.step_s_per_request) for _ in range(cluster.engines)]
        self._loads = EngineLoads([cluster.capacity] * cluster.engines)
        self._waiting: deque[Request] = deque()
        self._groups: dict[int, _Group] = {}
        self._events: list[tuple[float, int, int]] = []  # heap of (time, engine or _TRAINER, stamp)
        self._stamps = [0] * cluster.engines  # events with another stamp are outdated
        self._batch: list[int] | None = None  # being trained, or waiting for the weight transfer
        self._trainer: Literal["idle", "training", "ready", "sending"] = "idle"
        self._totals = _Totals()
        self._start_groups()

    def totals(self) -> _Totals:
        """Return a copy of the sums."""
        total = self._totals
        busy, requests = sum(e.busy_s for e in self._engines), sum(e.request_s for e in self._engines)
        times = (total.time, total.training_s, total.sync_s, busy, requests, total.discarded)
        return _Totals(*times, tokens=dict(total.tokens))

    def run(self, steps: int) -> None:
        """Simulate until `steps` further steps are complete."""
        last = self._scheduler.version + steps
        while self._scheduler.version < last:
            time, number, stamp = heapq.heappop(self._events)
            if number == _TRAINER:
                self._totals.time = time
                self._trainer_event(time)
            elif stamp == self._stamps[number]:
                self._totals.time = time
                self._complete_responses(number)
                self._admit()
            self._use_trainer()

    def _complete_responses(self, number: int) -> None:
        engine = self._engines[number]
        engine.advance(self._totals.time)
        for request in engine.pop_complete():
            self._loads.release(number, 1)
            group = self._groups[request.group]
            group.tokens += engine.tokens_by_version(request)
            group.unfinished -= 1
            if not group.unfinished:
                self._scheduler.finish(request.group)
        self._expect(number)

    def _use_trainer(self) -> None:
        """Start what the trainer can do now: train a batch, or send the weights."""
        now = self._totals.time
        if self._trainer == "idle" and (batch := self._scheduler.batch()) is not None:
            self._batch, self._trainer = batch, "training"
            tokens = sum(self._trained_tokens(self._groups[group]) for group in batch)
            seconds = tokens / self._cluster.trained_tokens_per_s
            self._totals.training_s += seconds
            heapq.heappush(self._events, (now + seconds, _TRAINER, 0))
        elif self._trainer == "ready" and self._scheduler.can_update():
            self._trainer = "sending"
            for number, engine in enumerate(self._engines):
                engine.advance(now)
                engine.is_paused = True
                self._expect(number)
            self._totals.sync_s += self._cluster.sync_s
            heapq.heappush(self._events, (now + self._cluster.sync_s, _TRAINER, 0))

    def _trained_tokens(self, group: _Group) -> float:
        return self._schedule.prompt_tokens * len(group.lengths) + sum(tokens for _, tokens in group.tokens)

    def _trainer_event(self, now: float) -> None:
        """Complete the training of a batch, or the weight transfer after it."""
        if self._trainer == "training":
            self._trainer = "ready"
            return
        assert self._batch is not None
        for number in self._batch:
            for version, tokens in self._groups.pop(number).tokens:
                staleness = self._scheduler.version - version
                self._totals.tokens[staleness] = self._totals.tokens.get(staleness, 0.0) + tokens
        self._scheduler.train(self._batch)
        self._batch, self._trainer = None, "idle"
        for engine in self._engines:
            engine.advance(now)
            engine.is_paused = False
            engine.update_weights()
        if self._schedule.partial_rollouts != "continue":
            self._discard_unfinished()
        self._start_groups()
        for number in range(len(self._engines)):
            self._expect(number)

    def _start_groups(self) -> None:
        for _ in range(self._scheduler.num_startable()):
            self._submit(self._scheduler.start(), next(self._lengths))
        self._admit()

    def _submit(self, number: int, lengths: Sequence[int]) -> None:
        self._groups[number] = _Group(lengths, len(lengths))
        self._waiting += [Request(number, length) for length in lengths]

    def _discard_unfinished(self) -> None:
        """Restart or drop every unfinished group."""
        numbers = self._scheduler.unfinished
        discarded = set(numbers)
        self._waiting = deque(request for request in self._waiting if request.group not in discarded)
        for number, engine in enumerate(self._engines):
            for _, tokens in engine.abort(discarded):
                self._loads.release(number, 1)
                self._totals.discarded += tokens
        for number in numbers:
            group = self._groups.pop(number)
            self._totals.discarded += sum(tokens for _, tokens in group.tokens)
            if self._schedule.partial_rollouts == "drop":
                self._scheduler.drop(number)
            else:
                self._scheduler.restart(number)
                self._submit(number, group.lengths)

    def _admit(self) -> None:
        """Give waiting requests to the engines with the fewest requests."""
        changed: set[int] = set()
        while self._waiting and (number := self._loads.assign(1)) is not None:
            self._engines[number].advance(self._totals.time)
            self._engines[number].admit(self._waiting.popleft())
            changed.add(number)
        for number in changed:
            self._expect(number)

    def _expect(self, number: int) -> None:
        """Schedule the next completion of an engine. Earlier events of it are outdated."""
        self._stamps[number] += 1
        end = self._engines[number].next_end()
        if end is not None:
            heapq.heappush(self._events, (end, number, self._stamps[number]))


def _result(cluster: Cluster, steps: int, before: _Totals, after: _Totals) -> Simulated:
    seconds, sync = after.time - before.time, after.sync_s - before.sync_s
    tokens = {staleness: count - before.tokens.get(staleness, 0.0) for staleness, count in after.tokens.items()}
    trained, discarded = sum(tokens.values()), after.discarded - before.discarded
    busy, requests = after.busy_s - before.busy_s, after.request_s - before.request_s
    return Simulated(
        step_s=seconds / steps,
        trainer_idle=max(0.0, 1 - (after.training_s - before.training_s + sync) / seconds),
        engines_idle=max(0.0, 1 - (busy / cluster.engines + sync) / seconds),
        running=requests / cluster.engines / seconds,
        tokens_per_s=trained / seconds,
        discarded=discarded / (trained + discarded),
        staleness={staleness: count / trained for staleness, count in sorted(tokens.items()) if count},
    )
