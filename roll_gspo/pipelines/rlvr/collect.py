"""The samples of one step: generated, scored and, with dynamic sampling, replaced until every group passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roll_gspo.batch import Completion, Rollouts
from roll_gspo.environments.pool import EnvironmentTime
from roll_gspo.pipelines.rlvr.episode_metrics import environment_time_metrics, episode_metrics
from roll_gspo.pipelines.rlvr.groups import Group
from roll_gspo.pipelines.rlvr.reward_alarm import FailedEpisodes, FailedSteps, FirstSample, RewardAlarm
from roll_gspo.pipelines.rlvr.reward_metrics import (
    component_metrics,
    count_by_domain,
    domain_metrics,
    num_failed,
    score_mean,
)
from roll_gspo.pipelines.rlvr.rollout_state import load_groups, save_groups, snapshot
from roll_gspo.pipelines.rlvr.rollout_stream import (
    CONTINUED,
    DROPPED,
    RESTARTED,
    RolloutStream,
    TrainableBatch,
)
from roll_gspo.pipelines.rlvr.rollout_thread import RolloutThread
from roll_gspo.rewards.base import RewardResult
from roll_gspo.rewards.job import RewardTime
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.scorer import Scorer
from roll_gspo.roles.weight_sync import WeightSync
from roll_gspo.tracking.console import Progress

logger = logging.getLogger(__name__)
Stage = Callable[[str], AbstractContextManager[Progress]]
_SLICE_S = 0.25


@dataclass(frozen=True)
class Collected:
    """A scored rollout.

    Attributes:
        rollouts: the samples that the step trains on.
        results: reward results, one per sample.
        metrics: metrics over all generated samples, dropped groups included.
    """

    rollouts: Rollouts
    results: tuple[RewardResult, ...]
    metrics: dict[str, float]

    @property
    def scores(self) -> Tensor:
        """Scores [B] float32; 0 for samples whose reward failed."""
        return torch.tensor([result.score for result in self.results])

    @property
    def valid(self) -> Tensor:
        """Mask [B] bool of the samples whose reward succeeded. All others are excluded from every computation."""
        return torch.tensor([result.failed is None for result in self.results])


class Collector:
    """Collects the samples of each step from a stream of groups.

    It implements `WeightSync`, so that weights change only when the stream allows it.

    Args:
        stream: the groups in flight.
        generator, rewards: the generation engine, and what gives the rewards.
        text_of: returns the response text that rewards score.
        weights: sends the weights to the engines; restarts lost ones while a step waits for samples.
        thread: pumps the stream while the trainer trains; None pumps it while a step waits for samples.
        max_failed_steps: stop after this many consecutive steps in which every reward failed; None never stops.
        max_failed_fraction: stop if a larger fraction of a step's episodes failed; None never stops.
    """

    def __init__(
        self,
        stream: RolloutStream,
        generator: Generator,
        rewards: Scorer,
        text_of: Callable[[Completion], str],
        weights: WeightSync,
        thread: RolloutThread | None = None,
        max_failed_steps: int | None = None,
        max_failed_fraction: float | None = None,
    ) -> None:
        self._stream = stream
        self._generator = generator
        self._rewards = rewards
        self._text_of = text_of
        self._weights = weights
        self._thread = thread
        self._alarm = RewardAlarm()
        self._failed_steps = FailedSteps(max_failed_steps)
        self._failed_episodes = FailedEpisodes(max_failed_fraction)
        self._unreleased: list[Group] = []
        self._is_collecting = False
        self._time = RewardTime(0.0, 0.0)
        self._environment_time = EnvironmentTime(0.0, 0.0)

    def collect(self, step: int, stage: Stage) -> Collected:
        """Wait for the batch of `step` and return it. The batch of the previous call counts as trained."""
        self.release()
        self._is_collecting = True
        if self._thread is not None:
            self._thread.start()
        self._stream.next_step()
        batch = self._stream.next_batch()
        while batch is None:
            self._advance(stage, "the samples of a step", self._stream.has_batch)
            batch = self._stream.next_batch()
        self._unreleased = batch.groups
        return self._collected(step, batch)

    def wait_for_push(self, stage: Stage) -> None:
        """Wait until no response needs the current weights of the engines."""
        if self._is_collecting and not self._stream.can_change_weights():
            self._advance(stage, "responses of the current weights", self._stream.can_change_weights, may_restore=False)

    def push(self, version: int) -> None:
        """Send the trainer's weights to the engines and free the slots of the last batch.

        Waits until no response needs the current weights. The groups that start afterwards count from `version`.
        """
        self.wait_for_push(lambda name: nullcontext(lambda done, total: None))
        with self._stream.changing_weights():
            self._weights.push(version)
        self.release()

    def restore(self, version: int) -> None:
        """Restart lost engines; see `WeightSync.restore`."""
        self._weights.restore(version)

    def release(self) -> None:
        """Free the slots of the last batch, if they are not free yet."""
        if self._unreleased:
            self._stream.trained(self._unreleased)
            self._unreleased = []

    def refresh(self) -> None:
        """Discard the responses of all groups in flight and sample them again with the current weights."""
        self._stream.refresh()

    def score(self, rollouts: Rollouts, progress: Progress | None = None) -> list[RewardResult]:
        """Score the rollouts; return one result per sample."""
        return self._rewards.score(rollouts, [self._text_of(c) for c in rollouts.completions], progress)

    def close(self) -> None:
        """Drop all groups in flight."""
        if self._thread is not None:
            self._thread.stop()
        self._stream.close()

    # state of a checkpoint

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let no group start or end in the block. The batch of the last `collect` counts as trained."""
        self.release()
        with self._stream.lock:
            yield

    def sampler_state(self) -> dict[str, Any]:
        """Return the state of the sampler after the prompts of the groups that `save` writes."""
        return snapshot(self._stream).sampler

    def save(self, folder: Path) -> None:
        """Write the groups in flight into a checkpoint, inside `frozen`."""
        save_groups(self._stream, folder)

    def load(self, folder: Path, step: int) -> None:
        """Load the groups in flight of a checkpoint after `step`.

        Raises:
            CheckpointError: the files cannot be read, or do not fit the settings.
        """
        load_groups(self._stream, folder, step)

    # waiting

    def _advance(self, stage: Stage, waited_for: str, condition: Callable[[], bool], may_restore: bool = True) -> None:
        """Let the engines generate until `condition` holds.

        With `may_restore`, the engines have the trainer's weights, so that lost ones can be restarted.
        """
        if self._thread is not None:
            with stage("wait_rollouts") as progress:

                def serve() -> None:
                    if may_restore:
                        self._weights.restore(self._generator.weights_version)
                    else:
                        self._generator.check_alive()
                    self._report(progress)

                self._thread.wait(condition, waited_for, serve)
            return
        stream = self._stream
        while not condition():
            if not (stream.num_generating or stream.num_scoring or stream.can_start()):
                raise RuntimeError(f"actor_infer: nothing is in flight while a step waits for {waited_for}")
            with stage("generate") as progress, self._generator.tracing():
                while not condition() and (stream.num_generating or stream.can_start()):
                    stream.pump(_SLICE_S)
                    self._report(progress)
            with stage("score") as progress:
                while not condition() and stream.num_scoring and not stream.can_start():
                    stream.pump(_SLICE_S)
                    self._report(progress)

    def _report(self, progress: Progress) -> None:
        progress(*self._stream.num_ready)

    # metrics

    def _collected(self, step: int, batch: TrainableBatch) -> Collected:
        groups = batch.groups
        rollouts = self._generator.collate([g.prompt for g in groups], [g.ordered_completions for g in groups])
        results = tuple(result for group in groups for result in group.ordered_results)
        metrics = self._metrics(step, [*groups, *batch.dropped])
        if self._stream.settings.query_filters:
            metrics |= self._filter_metrics(step, batch)
        if self._stream.settings.in_flight:
            metrics |= {name: float(self._stream.take_count(name)) for name in (CONTINUED, RESTARTED, DROPPED)}
        return Collected(rollouts, results, metrics)

    def _filter_metrics(self, step: int, batch: TrainableBatch) -> dict[str, float]:
        fillers = [group for group in batch.groups if group.is_filler]
        if fillers:
            logger.warning(
                "step %d: %d of %d groups passed query_filter_config after %d prompts; %d rejected ones fill the batch "
                "(max_sampling_rounds allows more prompts)",
                *(step, len(batch.groups) - len(fillers), len(batch.groups)),
                *(len(batch.groups) + len(batch.dropped), len(fillers)),
            )
        rejected = [*fillers, *batch.dropped]
        return {
            "sampling/prompts": float(len(batch.groups) + len(batch.dropped)),
            "sampling/groups_dropped": float(len(rejected)),
            "sampling/groups_filled": float(len(fillers)),
            "sampling/tokens_dropped": float(sum(group.num_tokens for group in batch.dropped)),
            **count_by_domain(self._rewards.domain_names, [group.domain for group in rejected], "groups_dropped"),
        }

    def _metrics(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        """Return metrics over all generated samples. Warn if rewards look broken."""
        results = [result for group in groups for result in group.ordered_results]
        domains = [group.domain for group in groups for _ in group.results]
        completions = [completion for group in groups for completion in group.ordered_completions]
        lengths = [completion.num_sampled for completion in completions]
        self._failed_episodes.check(step, domains, results)
        self._alarm.check(step, domains, results)
        head = groups[0]
        self._failed_steps.check(
            step, domains[0], results, lambda: FirstSample(head.prompt, self._text_of(head.completions[0]))
        )
        time = self._reward_time()
        return {
            "rollout/num_tokens": float(sum(lengths)),
            **({} if num_failed(results) == len(results) else {"rollout/score_mean": score_mean(results)}),
            "reward/failed": float(num_failed(results)),
            "reward/seconds": time.total_s,
            "reward/hidden_share": time.hidden_s / time.total_s if time.total_s else 1.0,
            **component_metrics(results),
            **episode_metrics(completions, domains),
            **self._environment_metrics(),
            **domain_metrics(self._rewards.domain_names, domains, results, lengths),
        }

    def _environment_metrics(self) -> dict[str, float]:
        """Return the metrics of the time of environments since the last call."""
        now = self._rewards.environment_time
        if now is None:
            return {}
        before, self._environment_time = self._environment_time, now
        return environment_time_metrics(now, before)

    def _reward_time(self) -> RewardTime:
        """Return the busy seconds of the reward processes since the last call."""
        now, before = RewardTime(self._stream.hidden_s, self._stream.reward_seconds), self._time
        self._time = now
        return RewardTime(now.hidden_s - before.hidden_s, now.total_s - before.total_s)
