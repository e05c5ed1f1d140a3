"""Metrics of reward results: over all samples, per domain and per component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from roll_gspo.rewards.base import RewardResult


def score_mean(results: Sequence[RewardResult]) -> float:
    """Return the mean score over samples whose reward succeeded; 0 if none did."""
    scores = [result.score for result in results if result.failed is None]
    return sum(scores) / len(scores) if scores else 0.0


def num_failed(results: Sequence[RewardResult]) -> int:
    """Return the number of samples whose reward failed."""
    return sum(result.failed is not None for result in results)


def domain_metrics(
    names: Sequence[str],
    domains: Sequence[str],
    results: Sequence[RewardResult],
    lengths: Sequence[int],
    family: str = "domain",
) -> dict[str, float]:
    """Return `<family>/<name>/{num_samples,failed,score_mean,response_length_mean}`; empty for a single domain.

    Args:
        names: all domains of the run. A domain without samples gets no means.
        domains, results, lengths: domain, reward result and response length in tokens of each sample.
        family: prefix of the metric names.
    """
    found: dict[str, float] = {}
    for name in names if len(names) > 1 else ():
        own = [index for index, domain in enumerate(domains) if domain == name]
        scored = [results[index] for index in own]
        failed = num_failed(scored)
        found[f"{family}/{name}/num_samples"] = float(len(own))
        found[f"{family}/{name}/failed"] = float(failed)
        if failed < len(own):
            found[f"{family}/{name}/score_mean"] = score_mean(scored)
        if own:
            found[f"{family}/{name}/response_length_mean"] = sum(lengths[index] for index in own) / len(own)
    return found


def component_metrics(results: Sequence[RewardResult], family: str = "reward/component") -> dict[str, float]:
    """Return `<family>/<component>`: the mean over the samples whose reward result has the component."""
    parts: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.components.items():
            parts.setdefault(name, []).append(value)
    return {f"{family}/{name}": sum(values) / len(values) for name, values in parts.items()}


def count_by_domain(names: Sequence[str], domains: Sequence[str], quantity: str) -> Mapping[str, float]:
    """Return `domain/<name>/<quantity>`: the count of each domain; empty for a single domain."""
    return {f"domain/{name}/{quantity}": float(domains.count(name)) for name in names if len(names) > 1}
