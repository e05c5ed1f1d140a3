"""Groups in flight: draw prompts, sample and score responses, filter groups, and hand out batches."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from roll_gspo.batch import Completion, Prompt
from roll_gspo.data.sampler import Sampler
from roll_gspo.pipelines.rlvr.groups import Group
from roll_gspo.pipelines.rlvr.request_sources import RequestSource, Responses, SampleClient
from roll_gspo.pipelines.rlvr.stream_settings import StreamSettings
from roll_gspo.rewards.base import RewardResult
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.scorer import Scorer
from roll_gspo.roles.scoring import Scoring
from roll_gspo.scheduling.staleness import StalenessScheduler

CONTINUED, RESTARTED, DROPPED = "rollout/continued", "rollout/restarted", "rollout/dropped"


class TrainableBatch(NamedTuple):
    """The groups of a training step, in the order of the batch, and the groups that were dropped meanwhile."""

    groups: list[Group]
    dropped: list[Group]


class RolloutStream:
    """Keep as many groups in flight as the staleness limit allows.

    One thread calls `pump`, which makes progress. Others may call all other methods. A sample depends only on its
    prompt, its seed and the weights. Groups are ordered by the draw of their prompt. Unless weights change in flight,
    batches therefore do not depend on the order in which responses and scores arrive.

    Args:
        sampler: draws the training prompts.
        generator: the generation engines.
        rewards: scores the responses.
        text_of: returns the response text that rewards score.
        settings: settings of the stream.
        source: makes the requests; None for responses of one turn.
    """

    def __init__(
        self,
        sampler: Sampler[Prompt],
        generator: Generator,
        rewards: Scorer,
        text_of: Callable[[Completion], str],
        settings: StreamSettings,
        source: RequestSource | None = None,
    ) -> None:
        self.settings = settings
        self.sampler = sampler
        self._generator = generator
        self._source = source or Responses(generator, settings.sampling)
        self._rewards = rewards
        self._text_of = text_of
        self.in_order = not settings.in_flight
        self.scheduler = StalenessScheduler(
            settings.groups_per_step, settings.max_staleness, self.in_order, settings.num_steps
        )
        self.groups: dict[int, Group] = {}  # by slot
        self.draws: Counter[int] = Counter()  # per batch; in flight, all draws count for batch 0
        self.counts: Counter[str] = Counter()
        self.dropped: dict[int, list[Group]] = {}  # per batch, as `draws`
        self.before_batch: dict[str, Any] = {}  # state of the sampler before the newest batch was drawn
        self.parked: list[Group] = []  # rejected groups of a batch that has no draws left
        self._keys = itertools.count()
        self._requested: dict[int, tuple[Group, int]] = {}
        self._scored: dict[int, tuple[Group, int]] = {}
        self._client: SampleClient | None = None
        self._scoring: Scoring | None = None
        self._busy_s = self.hidden_s = 0.0
        self.num_taken = 0  # responses and scores that arrived
        self.num_scored = 0  # samples of `groups` that have a score
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)

    # progress

    @property
    def num_generating(self) -> int:
        """Number of responses that are not finished."""
        return len(self._requested)

    @property
    def num_scoring(self) -> int:
        """Number of responses without a score."""
        return len(self._scored)

    @property
    def reward_seconds(self) -> float:
        """Busy seconds of the reward processes since the stream was opened."""
        return self._busy_s

    def pump(self, timeout_s: float) -> None:
        """Start groups, let the engines decode for about `timeout_s`, and score what they finished."""
        client, scoring = self._opened()
        with self.lock:
            if self._num_startable():
                client.submit(self._new_requests())
        # A request that the engines rejected is not outstanding, but only `poll` raises the error.
        finished = client.poll(timeout_s) if client.outstanding or self._requested else []
        with self.lock:
            for key, completion in finished:
                self._take_completion(scoring, key, completion)
            was_generating = bool(self._requested)
            wait_s = 0.0 if was_generating or finished else timeout_s
        results = scoring.take_finished(wait_s if self._scored else 0.0)
        with self.lock:
            self.num_taken += len(finished) + len(results)
            busy_s = scoring.time.total_s
            self.hidden_s += busy_s - self._busy_s if was_generating else 0.0
            self._busy_s = busy_s
            for index, result in results:
                self._take_result(index, result)
            if not (finished or results or self._requested or self._scored or self._num_startable()):
                self.changed.wait(timeout_s)
            self.changed.notify_all()

    def can_start(self) -> bool:
        """Return whether further groups may start now."""
        with self.lock:
            return self._num_startable() > 0

    def has_batch(self) -> bool:
        """Return whether `next_batch` returns a batch."""
        with self.lock:
            return self.scheduler.batch() is not None

    @property
    def num_ready(self) -> tuple[int, int]:
        """Number of scored samples of untrained groups (at most those of a step), and of samples per step."""
        with self.lock:
            size = self.settings.groups_per_step * self.settings.sampling.num_samples
            return min(size, self.num_scored), size

    def take_count(self, name: str) -> int:
        """Return the count `name` of unfinished responses, and reset it."""
        with self.lock:
            return self.counts.pop(name, 0)

    def next_batch(self) -> TrainableBatch | None:
        """Return the groups of the next training step, or None if they are not complete yet."""
        with self.lock:
            slots = self.scheduler.batch()
            if slots is None:
                return None
            groups = [self.groups[slot] for slot in slots]
            if self.in_order:
                groups.sort(key=lambda group: (group.is_filler, group.draw))
            # Sorted, because a mean over samples depends on their order in the last digit.
            dropped = sorted(self.dropped.pop(self.batch_of(slots[0]), []), key=lambda group: group.draw)
            return TrainableBatch(groups, dropped)

    def trained(self, groups: Sequence[Group]) -> None:
        """Free the slots of groups that were trained. The weights of the engines have changed already."""
        with self.lock:
            if self.in_order:
                del self.draws[self.scheduler.version]
            self.scheduler.train([group.slot for group in groups])
            for group in groups:
                self._remove(group.slot)
            self.changed.notify_all()

    def can_change_weights(self) -> bool:
        """Return whether the weights may change now.

        Unless weights change in flight, every group that needs the current weights must be complete.
        """
        with self.lock:
            return self.scheduler.can_update()

    @contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Apply `partial_rollouts` to unfinished responses around a change of the weights."""
        with self.lock:
            stopped: list[tuple[Group, int]] = []
            # Groups of a checkpoint that were not submitted yet continue with the weights that sampled them.
            if self._client is not None and self.settings.in_flight and self.settings.partial_rollouts != "continue":
                stopped = self._stop_unfinished()
            yield
            if stopped:
                client, _ = self._opened()
                client.submit([self._request(group, sample) for group, sample in stopped])

    def close(self) -> None:
        """Drop all groups in flight."""
        with self.lock:
            if self._scoring is not None:
                self._scoring.__exit__(None, None, None)
            if self._client is not None:
                self._client.close()
            self._client = self._scoring = None

    def next_step(self) -> None:
        """Begin a training step: restart judge servers that died, and reset the limits of printed output."""
        with self.lock:
            if self._scoring is not None:
                self._scoring.next_step()

    def partials(self) -> dict[int, dict[int, Completion]]:
        """Return the unfinished responses by slot and sample; only if weights change in flight."""
        if self._client is None or self.in_order:
            return {}
        found: dict[int, dict[int, Completion]] = {}
        for key, completion in self._client.partials():
            if key in self._requested and completion.token_ids:
                group, sample = self._requested[key]
                found.setdefault(group.slot, {})[sample] = completion
        return found

    # starting groups

    def _opened(self) -> tuple[SampleClient, Scoring]:
        if self._client is None or self._scoring is None:
            self._client, self._scoring = self._source.open(), self._rewards.open()
            self._scoring.__enter__()
            with self.lock:
                waiting = [group for _, group in sorted(self.groups.items()) if not group.is_scored]
                self._client.submit([self._request(g, sample) for g in waiting for sample in g.missing()])
                for group in waiting:
                    for sample in sorted(group.completions.keys() - group.results.keys()):
                        self._score(self._scoring, group, sample)
        return self._client, self._scoring

    def _num_startable(self) -> int:
        startable = self.scheduler.num_startable()
        if not self.in_order:
            return startable
        missing = self.num_missing  # replacements come before the next batch
        return missing if missing or self.scheduler.num_unfinished else min(startable, self.settings.groups_per_step)

    @property
    def num_missing(self) -> int:
        """Number of dropped groups of the newest batch that are not replaced yet; 0 if weights change in flight."""
        # Earlier batches are complete, since the newest one was started after them.
        return self.settings.groups_per_step * len(self.draws) - len(self.groups) if self.in_order else 0

    def _new_requests(self) -> list[Any]:
        replaced = self.num_missing
        if self.in_order and not replaced:
            self.before_batch = self.sampler.state_dict()
        if replaced:  # One by one, because the order of an interleaved batch depends on its size.
            prompts = [prompt for _ in range(replaced) for prompt in self.sampler.next_batch(1)]
        else:
            prompts = self.sampler.next_batch(self._num_startable())
        requests: list[Any] = []
        for prompt, domain in zip(prompts, self._rewards.domains(prompts), strict=True):
            slot = self.scheduler.start()
            batch = self.batch_of(slot)
            draw, self.draws[batch] = self.draws[batch], self.draws[batch] + 1
            group = self.groups[slot] = Group(slot, draw, prompt, domain, self.seeds(batch, draw))
            requests += [self._request(group, sample) for sample in group.missing()]
        return requests

    def seeds(self, batch: int, draw: int) -> tuple[int, ...]:
        """Return the seeds of a group. Unless weights change in flight, they are those of the synchronous run."""
        size = self.settings.sampling.num_samples
        purpose = f"step {batch + 1}" if self.in_order else "in flight"
        return tuple(self._generator.seeds(purpose, draw, size))

    def batch_of(self, slot: int) -> int:
        """Return the number of the batch whose draws a group counts for; 0 for all if weights change in flight."""
        return slot // self.settings.groups_per_step if self.in_order else 0

    def _request(self, group: Group, sample: int) -> Any:
        key = next(self._keys)
        self._requested[key] = group, sample
        return self._source.request(group, sample, key)

    def refresh(self) -> None:
        """Discard all responses and sample every group again with the current weights, which change in flight."""
        with self.lock:
            client, _ = self._opened()
            begun = sum(bool(completion.token_ids) for *_, completion in self._abort())
            begun += sum(self._is_live(group) for group, _ in self._requested.values())  # ended, but not taken yet
            self.counts[RESTARTED] += begun + sum(len(group.completions) for group in self.groups.values())
            self._requested.clear()
            self._scored.clear()
            for slot, group in self.groups.items():
                self.scheduler.restart(slot)
                group.completions.clear()
                group.results.clear()
                group.is_filler = False
            self.num_scored = 0
            client.submit([self._request(g, sample) for g in self.groups.values() for sample in g.missing()])

    def _remove(self, slot: int) -> None:
        self.num_scored -= len(self.groups.pop(slot).results)

    def _abort(self) -> list[tuple[Group, int, Completion]]:
        """Abort every unfinished response; return its group, the number of its sample and its tokens."""
        client, _ = self._opened()
        aborted = [(*self._requested.pop(key), completion) for key, completion in client.abort(list(self._requested))]
        for group, sample, _ in aborted:
            group.partials.pop(sample, None)
        return aborted

    def _stop_unfinished(self) -> list[tuple[Group, int]]:
        """Abort every unfinished response; return those to sample again, after groups were dropped."""
        drops = self.settings.partial_rollouts == "drop"
        aborted = self._abort()
        begun = {group.slot for group, _, completion in aborted if completion.token_ids}
        self.counts[DROPPED if drops else RESTARTED] += sum(bool(completion.token_ids) for *_, completion in aborted)
        if drops:
            for slot in begun:
                self.scheduler.drop(slot)
                self._remove(slot)
            return [(group, sample) for group, sample, _ in aborted if group.slot not in begun]
        ended = {group.slot for group, _ in self._requested.values()}  # not taken yet; their tokens are kept
        for slot, group in {group.slot: group for group, *_ in aborted}.items():
            if not group.completions and slot not in ended:
                self.scheduler.restart(slot)
        return [(group, sample) for group, sample, _ in aborted]

    # results

    def _take_completion(self, scoring: Scoring, key: int, completion: Completion) -> None:
        group, sample = self._requested.pop(key, (None, 0))
        if group is None or not self._is_live(group):
            return  # refreshed or dropped meanwhile
        group.completions[sample] = completion
        group.partials.pop(sample, None)
        self.counts[CONTINUED] += len(completion.version_runs) > 1
        self._score(scoring, group, sample)

    def _is_live(self, group: Group) -> bool:
        return self.groups.get(group.slot) is group

    def _score(self, scoring: Scoring, group: Group, sample: int) -> None:
        result = self._rewards.result(group.completions[sample])
        if result is not None:
            self._add_result(group, sample, result)
            return
        index = next(self._keys)
        self._scored[index] = group, sample
        scoring.submit(index, *self._rewards.request(group.prompt, self._text_of(group.completions[sample])))

    def _take_result(self, index: int, result: RewardResult) -> None:
        group, sample = self._scored.pop(index, (None, 0))
        if group is None or not self._is_live(group):
            return  # refreshed or dropped meanwhile
        self._add_result(group, sample, result)

    def _add_result(self, group: Group, sample: int, result: RewardResult) -> None:
        group.results[sample] = result
        self.num_scored += 1
        if group.is_scored:
            self._finish(group)

    def _finish(self, group: Group) -> None:
        """Keep a scored group, or replace it if it fails the filter."""
        if group.passes(self.settings.query_filters.get(group.domain)):
            self.scheduler.finish(group.slot)
        elif self._may_replace(group):
            self.scheduler.drop(group.slot)
            self._remove(group.slot)
            self.dropped.setdefault(self.batch_of(group.slot), []).append(group)
        elif self.in_order:
            self.parked.append(group)
        else:
            group.is_filler = True
            self.scheduler.finish(group.slot)
        if self.parked and self.scheduler.num_unfinished == len(self.parked) and not self._num_startable():
            self._fill()

    def _may_replace(self, group: Group) -> bool:
        if not self.in_order:
            return len(self.dropped.get(0, ())) < self.settings.max_draws - self.settings.groups_per_step
        return self.draws[self.batch_of(group.slot)] + self.num_missing < self.settings.max_draws

    def _fill(self) -> None:
        """Complete a batch without draws left: its first rejected groups take the open slots."""
        slots = sorted(group.slot for group in self.parked)
        dropped = self.dropped.setdefault(self.batch_of(slots[0]), [])
        rejected = sorted([*dropped, *self.parked], key=lambda group: group.draw)
        dropped[:] = rejected[len(slots) :]
        for slot, group in zip(slots, rejected, strict=False):
            group.slot, group.is_filler = slot, True
            self.groups[slot] = group
            self.scheduler.finish(slot)
        self.parked = []
