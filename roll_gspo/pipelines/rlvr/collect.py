"""The samples of one step: generated, scored and, with dynamic sampling, replaced until every group passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.query_filter import QueryFilterSettings, kept_groups
from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.data.sampler import Sampler
from roll_gspo.pipelines.rlvr.reward_alarm import FailedSteps, FirstSample, RewardAlarm
from roll_gspo.pipelines.rlvr.reward_metrics import (
    component_metrics,
    count_by_domain,
    domain_metrics,
    num_failed,
    score_mean,
)
from roll_gspo.rewards.base import RewardResult
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.reward_manager import RewardManager
from roll_gspo.roles.scoring import RewardTime
from roll_gspo.strategies.base import Sampling
from roll_gspo.tracking.console import Progress

logger = logging.getLogger(__name__)
Stage = Callable[[str], AbstractContextManager[Progress]]


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


@dataclass(frozen=True)
class _Group:
    """The samples of one prompt."""

    prompt: Prompt
    domain: str
    completions: tuple[Completion, ...]
    results: tuple[RewardResult, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)


class Collector:
    """Generate and score the samples of a step.

    Args:
        sampler: draws the training prompts.
        generator, reward_manager: the generation engine and the reward manager.
        sampling: sampling settings of the responses.
        text_of: returns the response text that rewards score.
        num_prompts: number of groups in a full batch.
        query_filters: filter by domain that drops groups. Domains without a filter keep all groups.
        max_failed_steps: stop after this many consecutive steps in which every reward failed; None never stops.
        max_rounds: maximum generation rounds per step. Dropped groups fill a batch that is still incomplete.
    """

    def __init__(
        self,
        sampler: Sampler[Prompt],
        generator: Generator,
        reward_manager: RewardManager,
        sampling: Sampling,
        text_of: Callable[[Completion], str],
        *,
        num_prompts: int,
        query_filters: Mapping[str, QueryFilterSettings],
        max_rounds: int,
        max_failed_steps: int | None = None,
    ) -> None:
        self._sampler = sampler
        self._generator = generator
        self._reward_manager = reward_manager
        self._sampling = sampling
        self._text_of = text_of
        self._num_prompts = num_prompts
        self._filters = query_filters
        self._alarm = RewardAlarm()
        self._failed_steps = FailedSteps(max_failed_steps)
        self._max_rounds = max_rounds

    def collect(self, step: int, stage: Stage) -> Collected:
        """Return a full batch for `step`. Step and round determine the seeds of every generation."""
        kept: list[_Group] = []
        dropped: list[_Group] = []
        rounds = 0
        time = RewardTime(0.0, 0.0)
        while len(kept) < self._num_prompts and rounds < self._max_rounds:
            prompts = self._sampler.next_batch(self._num_prompts - len(kept))
            purpose = f"step {step} round {rounds}" if rounds else f"step {step}"
            rollouts, results, spent = self._generate(prompts, purpose, stage)
            time = RewardTime(time.hidden_s + spent.hidden_s, time.total_s + spent.total_s)
            rounds += 1
            groups = self._groups(rollouts, results)
            if not self._filters:
                return Collected(rollouts, tuple(results), self._metrics(step, groups, time))
            for group in groups:
                query_filter = self._filters.get(group.domain)
                (kept if query_filter is None or _passes(group, query_filter) else dropped).append(group)
        return self._batch(step, kept, dropped, rounds, time)

    def _generate(
        self, prompts: Sequence[Prompt], purpose: str, stage: Stage
    ) -> tuple[Rollouts, list[RewardResult], RewardTime]:
        """Generate samples and return them with their results. Each sample is scored as soon as it completes."""
        with self._reward_manager.open() as scoring:

            def submit(number: int, sample: int, completion: Completion) -> None:
                domain, request = self._reward_manager.request(prompts[number], self._text_of(completion))
                scoring.submit(number * self._sampling.num_samples + sample, domain, request)

            with stage("generate") as progress:
                rollouts = self._generator.generate(prompts, self._sampling, purpose, progress, submit)
            with stage("score") as progress:
                results = scoring.results(progress)
            return rollouts, results, scoring.time

    def score(self, rollouts: Rollouts, progress: Progress | None = None) -> list[RewardResult]:
        """Score the rollouts; return one result per sample."""
        return self._reward_manager.score(rollouts, [self._text_of(c) for c in rollouts.completions], progress)

    def _batch(self, step: int, kept: list[_Group], dropped: list[_Group], rounds: int, time: RewardTime) -> Collected:
        num_missing = self._num_prompts - len(kept)
        if num_missing:
            logger.warning(
                "step %d: %d of %d groups passed query_filter_config in %d rounds of generation; %d dropped ones fill "
                "the batch (max_sampling_rounds allows more rounds)",
                *(step, len(kept), self._num_prompts, rounds, num_missing),
            )
        used = kept + dropped[:num_missing]
        rollouts = self._generator.collate([g.prompt for g in used], [g.completions for g in used])
        rejected = [group.domain for group in dropped]
        metrics = self._metrics(step, kept + dropped, time) | {
            "sampling/rounds": float(rounds),
            "sampling/prompts": float(len(kept) + len(dropped)),
            "sampling/groups_dropped": float(len(dropped)),
            "sampling/groups_filled": float(num_missing),
            "sampling/tokens_dropped": float(sum(group.num_tokens for group in dropped[num_missing:])),
            **count_by_domain(self._reward_manager.domain_names, rejected, "groups_dropped"),
        }
        return Collected(rollouts, tuple(result for group in used for result in group.results), metrics)

    def _groups(self, rollouts: Rollouts, results: Sequence[RewardResult]) -> list[_Group]:
        """Return the samples of each prompt, in the order of the prompts."""
        found: dict[int, list[int]] = {}
        for sample, group in enumerate(rollouts.group_ids.tolist()):
            found.setdefault(group, []).append(sample)
        prompts = [rollouts.prompts[samples[0]] for samples in found.values()]
        return [
            _Group(prompt, domain, tuple(rollouts.completions[i] for i in samples), tuple(results[i] for i in samples))
            for prompt, domain, samples in zip(
                prompts, self._reward_manager.domains(prompts), found.values(), strict=True
            )
        ]

    def _metrics(self, step: int, groups: Sequence[_Group], time: RewardTime) -> dict[str, float]:
        """Return metrics over all generated samples. Warn if rewards look broken."""
        results = [result for group in groups for result in group.results]
        domains = [group.domain for group in groups for _ in group.results]
        lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
        self._alarm.check(step, domains, results)
        head = groups[0]
        self._failed_steps.check(
            step, domains[0], results, lambda: FirstSample(head.prompt, self._text_of(head.completions[0]))
        )
        return {
            "rollout/num_tokens": float(sum(lengths)),
            **({} if num_failed(results) == len(results) else {"rollout/score_mean": score_mean(results)}),
            "reward/failed": float(num_failed(results)),
            "reward/seconds": time.total_s,
            "reward/hidden_share": time.hidden_s / time.total_s if time.total_s else 1.0,
            **component_metrics(results),
            **domain_metrics(self._reward_manager.domain_names, domains, results, lengths),
        }


def _passes(group: _Group, query_filter: QueryFilterSettings) -> bool:
    """Return whether the group passes the filter. Samples whose reward failed are ignored."""
    scores = torch.tensor([result.score for result in group.results if result.failed is None])
    if len(scores) < min(2, len(group.results)):
        return False
    return bool(kept_groups(scores, torch.zeros(len(scores), dtype=torch.int64), query_filter).all())
