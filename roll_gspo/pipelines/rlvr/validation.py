"""Held-out prompts: generated, judged, and summed up in figures that can be quoted.

The prompt is the unit of every figure: samples of a prompt are averaged first, intervals are over prompts. Samples
whose reward failed are left out and counted; a prompt with fewer than k others has no pass@k and maj@k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from roll_gspo.algorithms.interval import Estimate, estimate
from roll_gspo.algorithms.pass_at_k import maj_at_k, pass_at_k
from roll_gspo.batch import Prompt, Rollouts
from roll_gspo.config.validation import ValidationConfig
from roll_gspo.errors import ConfigError
from roll_gspo.pipelines.rlvr.datasets import group_of
from roll_gspo.pipelines.rlvr.sample_records import rollout_records
from roll_gspo.rewards.base import RewardResult
from roll_gspo.roles.generator import Generator
from roll_gspo.strategies.base import Sampling
from roll_gspo.tracking.console import Progress
from roll_gspo.tracking.rollouts import RolloutRecord

ALL = "all"
TOTALS = tuple(
    f"validation/{name}"
    for name in ("score_mean", "num_samples", "failed", "response_length_mean", "truncated_fraction")
)
PURPOSE = "validation"  # of the seeds: every validation of a run draws the same


class SampleScorer(Protocol):
    """Whoever judges validation samples."""

    def __call__(self, rollouts: Rollouts) -> Sequence[RewardResult]:
        """One result a sample."""
        ...


@dataclass(frozen=True)
class Validation:
    """What is validated.

    Attributes:
        config: the block.
        prompts: held-out ones.
        sampling: how they are answered.
        domains: which reward block judges each of some prompts.
    """

    config: ValidationConfig
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    domains: Callable[[Iterable[Prompt]], list[str]]

    def judged(self, generator: Generator, judge: SampleScorer, progress: Progress) -> Iterator[ScoredBatch]:
        """Generate and judge `batch_size` prompts at a time; how many are taken at once changes no sample."""
        size = self.config.batch_size or len(self.prompts)
        total = len(self.prompts) * self.sampling.num_samples
        for first in range(0, len(self.prompts), size):
            done = first * self.sampling.num_samples

            def report(newly: int, of: int, done: int = done) -> None:
                progress(done + newly, total)

            prompts = self.prompts[first : first + size]
            rollouts = generator.generate(prompts, self.sampling, PURPOSE, report, first=first)
            yield ScoredBatch(rollouts, tuple(judge(rollouts)), self.domains(rollouts.prompts), first)


@dataclass(frozen=True)
class ScoredBatch:
    """Some prompts with their samples.

    Attributes:
        rollouts, results, domains: the samples, and of each its result and the reward block that judged it.
        first: number of the first prompt.
    """

    rollouts: Rollouts
    results: tuple[RewardResult, ...]
    domains: list[str]
    first: int


def validation_records(batch: ScoredBatch, decode: Callable[[Sequence[int]], str]) -> Iterator[RolloutRecord]:
    """The samples as they are written; there is no advantage."""
    return rollout_records(batch.rollouts, batch.domains, batch.results, decode, first_group=batch.first)


@dataclass(frozen=True)
class Answers:
    """The samples of one prompt, as its figures see them.

    Attributes:
        group: what its figures go to.
        scores, answers: of the samples whose reward did not fail.
        num_failed: of the others.
        lengths: response tokens of every sample.
        num_truncated: responses that ended at the limit.
    """

    group: str
    scores: tuple[float, ...]
    answers: tuple[str | None, ...]
    num_failed: int
    lengths: tuple[int, ...]
    num_truncated: int


def answers_of(batch: ScoredBatch, group_by: str) -> list[Answers]:
    """Of every prompt of a batch, in order."""
    found: dict[int, list[int]] = {}
    for sample, prompt in enumerate(batch.rollouts.group_ids.tolist()):
        found.setdefault(prompt, []).append(sample)
    answers = []
    for samples in found.values():
        completions = [batch.rollouts.completions[i] for i in samples]
        judged = [batch.results[i] for i in samples if batch.results[i].failed is None]
        answers.append(
            Answers(
                group=_label(batch.rollouts.prompts[samples[0]].row, group_by),
                scores=tuple(result.score for result in judged),
                answers=tuple(result.answer for result in judged),
                num_failed=len(samples) - len(judged),
                lengths=tuple(len(completion.token_ids) for completion in completions),
                num_truncated=sum(completion.finish_reason == "length" for completion in completions),
            )
        )
    return answers


def _label(row: Mapping[str, object], group_by: str) -> str:
    label = group_of(row, group_by)
    return f"{group_by}_{ALL}" if label == ALL else label  # the name of the figures over all prompts


@dataclass(frozen=True)
class Summary:
    """The figures of one group of prompts, or of all.

    Attributes:
        group: its name.
        num_prompts: how many.
        num_samples: samples a prompt.
        num_scored, num_failed: samples of all prompts whose reward answered, and did not.
        score_mean: over scored samples; NaN without any.
        average: avg@n, the mean over prompts; None where nothing was scored.
        pass_at: pass@k by k.
        maj_at: maj@k by k; empty where no sample has an answer, e.g. because the reward tells none.
        response_length_mean: tokens.
        truncated_fraction: responses that ended at the length limit.
    """

    group: str
    num_prompts: int
    num_samples: int
    num_scored: int
    num_failed: int
    score_mean: float
    average: Estimate | None
    pass_at: Mapping[int, Estimate] = field(default_factory=dict)
    maj_at: Mapping[int, Estimate] = field(default_factory=dict)
    response_length_mean: float = 0.0
    truncated_fraction: float = 0.0

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Every figure that has an interval, by its name: `avg@8`, `pass@1`, ..."""
        return {
            **({f"avg@{self.num_samples}": self.average} if self.average is not None else {}),
            **{f"pass@{k}": figure for k, figure in self.pass_at.items()},
            **{f"maj@{k}": figure for k, figure in self.maj_at.items()},
        }


def summaries(answers: Sequence[Answers], config: ValidationConfig) -> list[Summary]:
    """One for each group, in the order of the data, and one over all prompts."""
    groups: dict[str, list[Answers]] = {}
    for prompt in answers:
        groups.setdefault(prompt.group, []).append(prompt)
    return [_summary(name, group, config) for name, group in [*groups.items(), (ALL, list(answers))]]


def _summary(name: str, prompts: Sequence[Answers], config: ValidationConfig) -> Summary:
    scored = [p for p in prompts if p.scores]
    scores = [score for p in scored for score in p.scores]
    lengths = [length for p in prompts for length in p.lengths]
    is_fraction = all(0 <= score <= 1 for score in scores)
    votes = any(answer is not None for p in scored for answer in p.answers)
    pass_at, maj_at = {}, {}
    for k in config.attempts:
        enough = [p for p in scored if len(p.scores) >= k]
        size = sum(len(p.scores) for p in enough)
        if enough:
            pass_at[k] = estimate([_passes(p, k, config.correct_score) for p in enough], size, is_fraction=True)
        if enough and votes:
            majorities = [maj_at_k(p.answers, p.scores, k) for p in enough]
            maj_at[k] = estimate(majorities, size, is_fraction=is_fraction)
    means = [math.fsum(p.scores) / len(p.scores) for p in scored]
    return Summary(
        group=name,
        num_prompts=len(prompts),
        num_samples=config.num_samples,
        num_scored=len(scores),
        num_failed=sum(p.num_failed for p in prompts),
        score_mean=math.fsum(scores) / len(scores) if scores else math.nan,
        average=estimate(means, len(scores), is_fraction=is_fraction) if means else None,
        pass_at=pass_at,
        maj_at=maj_at,
        response_length_mean=sum(lengths) / len(lengths),
        truncated_fraction=sum(p.num_truncated for p in prompts) / len(lengths),
    )


def _passes(prompt: Answers, k: int, correct_score: float) -> float:
    return pass_at_k(len(prompt.scores), sum(score >= correct_score for score in prompt.scores), k)


def metric_names(prompts: Iterable[Prompt], config: ValidationConfig) -> list[str]:
    """Every name that `validation_metrics` may give for these prompts, also where there will be nothing to average."""
    groups = [*dict.fromkeys(_label(prompt.row, config.group_by) for prompt in prompts), ALL]
    kinds = [f"avg@{config.num_samples}", *(f"{kind}@{k}" for k in config.attempts for kind in ("pass", "maj"))]
    return [*TOTALS, *(f"validation/{group}/{kind}" for group in groups for kind in kinds)]


def check_keep_best(keep: str | None, prompts: Iterable[Prompt], config: ValidationConfig) -> None:
    """See that `keep_best` is a figure of these prompts, before a run has spent steps on it.

    Raises:
        ConfigError: it is none.
    """
    known = metric_names(prompts, config)
    if keep is not None and keep not in known:
        raise ConfigError(f"checkpoint_config.keep_best: no figure '{keep}'; choose one of {', '.join(known)}")


def validation_metrics(figures: Sequence[Summary]) -> dict[str, float]:
    """What the trackers get: every estimate of every group, and the limits of the average's interval."""
    total = figures[-1]
    values = (
        *(total.score_mean, float(total.num_scored), float(total.num_failed)),
        *(total.response_length_mean, total.truncated_fraction),
    )
    metrics = dict(zip(TOTALS, values, strict=True))
    for summary in figures:
        for name, figure in summary.estimates.items():
            metrics[f"validation/{summary.group}/{name}"] = figure.mean
        if summary.average is not None and math.isfinite(summary.average.low):
            average = f"validation/{summary.group}/avg@{summary.num_samples}"
            metrics |= {f"{average}_low": summary.average.low, f"{average}_high": summary.average.high}
    return metrics
