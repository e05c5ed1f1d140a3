"""Validation: generate and score held-out prompts, and summarize them in metrics.

Every metric first averages the samples of a prompt, then the prompts. Confidence intervals are over prompts. Samples
whose reward failed are excluded and counted. A prompt with fewer than k scored samples has no pass@k and maj@k.
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
from roll_gspo.rewards.base import RewardResult
from roll_gspo.strategies.base import Sampling
from roll_gspo.tracking.console import Progress

ALL = "all"
TOTALS = tuple(
    f"validation/{name}"
    for name in ("score_mean", "num_samples", "failed", "response_length_mean", "truncated_fraction")
)
PURPOSE = "validation"  # Purpose of the seeds: every validation of a run draws the same samples.


class SampleGenerator(Protocol):
    """The generation engines, or episodes that are played with them."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        purpose: str,
        progress: Callable[[int, int], None] | None = None,
        *,
        first: int = 0,
    ) -> Rollouts:
        """Sample `sampling.num_samples` responses per prompt; see `Generator.generate`."""
        ...


class SampleScorer(Protocol):
    """Callable that scores validation samples."""

    def __call__(self, rollouts: Rollouts) -> Sequence[RewardResult]:
        """Return one result per sample."""
        ...


@dataclass(frozen=True)
class Validation:
    """Held-out prompts and the settings of their evaluation.

    Attributes:
        config: the `validation` block.
        prompts: held-out prompts.
        sampling: sampling settings of the responses.
        domains: returns the reward block of each given prompt.
    """

    config: ValidationConfig
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    domains: Callable[[Iterable[Prompt]], list[str]]

    def scored(self, generator: SampleGenerator, score: SampleScorer, progress: Progress) -> Iterator[ScoredBatch]:
        """Generate and score `batch_size` prompts at a time. The batch size does not change the samples."""
        size = self.config.batch_size or len(self.prompts)
        total = len(self.prompts) * self.sampling.num_samples
        for first in range(0, len(self.prompts), size):
            done = first * self.sampling.num_samples

            def report(newly: int, of: int, done: int = done) -> None:
                progress(done + newly, total)

            prompts = self.prompts[first : first + size]
            rollouts = generator.generate(prompts, self.sampling, PURPOSE, report, first=first)
            yield ScoredBatch(rollouts, tuple(score(rollouts)), self.domains(rollouts.prompts), first)


@dataclass(frozen=True)
class ScoredBatch:
    """A batch of prompts with their scored samples.

    Attributes:
        rollouts, results, domains: the samples, and the result and reward block of each.
        first: index of the first prompt.
    """

    rollouts: Rollouts
    results: tuple[RewardResult, ...]
    domains: list[str]
    first: int


@dataclass(frozen=True)
class Answers:
    """Scores, answers and lengths of the samples of one prompt.

    Attributes:
        group: group of the prompt in the metrics.
        scores, answers: scores and answers of the samples whose reward succeeded.
        num_failed: number of samples whose reward failed.
        lengths: response length of every sample in tokens.
        num_truncated: number of responses that reached the length limit.
    """

    group: str
    scores: tuple[float, ...]
    answers: tuple[str | None, ...]
    num_failed: int
    lengths: tuple[int, ...]
    num_truncated: int


def answers_of(batch: ScoredBatch, group_by: str) -> list[Answers]:
    """Return the `Answers` of every prompt of a batch, in order."""
    found: dict[int, list[int]] = {}
    for sample, prompt in enumerate(batch.rollouts.group_ids.tolist()):
        found.setdefault(prompt, []).append(sample)
    answers = []
    for samples in found.values():
        completions = [batch.rollouts.completions[i] for i in samples]
        scored = [batch.results[i] for i in samples if batch.results[i].failed is None]
        answers.append(
            Answers(
                group=_label(batch.rollouts.prompts[samples[0]].row, group_by),
                scores=tuple(result.score for result in scored),
                answers=tuple(result.answer for result in scored),
                num_failed=len(samples) - len(scored),
                lengths=tuple(completion.num_sampled for completion in completions),
                num_truncated=sum(completion.finish_reason == "length" for completion in completions),
            )
        )
    return answers


def _label(row: Mapping[str, object], group_by: str) -> str:
    label = group_of(row, group_by)
    return f"{group_by}_{ALL}" if label == ALL else label  # `ALL` names the metrics over all prompts


@dataclass(frozen=True)
class Summary:
    """Metrics of one group of prompts, or of all prompts.

    Attributes:
        group: name of the group.
        num_prompts: number of prompts.
        num_samples: number of samples per prompt.
        num_scored, num_failed: number of samples whose reward succeeded, and failed.
        score_mean: mean score over scored samples; NaN if there are none.
        average: avg@n, the mean over prompts; None if no sample was scored.
        pass_at: pass@k by k.
        maj_at: maj@k by k; empty if no sample has an answer, e.g. because the reward extracts none.
        response_length_mean: mean response length in tokens.
        truncated_fraction: fraction of responses that reached the length limit.
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
        """Estimates with a confidence interval, by name: `avg@8`, `pass@1`, ..."""
        return {
            **({f"avg@{self.num_samples}": self.average} if self.average is not None else {}),
            **{f"pass@{k}": figure for k, figure in self.pass_at.items()},
            **{f"maj@{k}": figure for k, figure in self.maj_at.items()},
        }


def summaries(answers: Sequence[Answers], config: ValidationConfig) -> list[Summary]:
    """Return one summary per group in the order of the data, then one over all prompts."""
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
    """Return every name that `validation_metrics` can return for these prompts, even if no sample is scored."""
    groups = [*dict.fromkeys(_label(prompt.row, config.group_by) for prompt in prompts), ALL]
    kinds = [f"avg@{config.num_samples}", *(f"{kind}@{k}" for k in config.attempts for kind in ("pass", "maj"))]
    return [*TOTALS, *(f"validation/{group}/{kind}" for group in groups for kind in kinds)]


def check_keep_best(keep: str | None, prompts: Iterable[Prompt], config: ValidationConfig) -> None:
    """Check before training that `keep_best` names a validation metric of these prompts.

    Raises:
        ConfigError: `keep_best` names no metric of these prompts.
    """
    known = metric_names(prompts, config)
    if keep is not None and keep not in known:
        raise ConfigError(f"checkpoint_config.keep_best: no figure '{keep}'; choose one of {', '.join(known)}")


def validation_metrics(figures: Sequence[Summary]) -> dict[str, float]:
    """Return metrics for the trackers: all estimates of every group and the confidence interval of the average."""
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
