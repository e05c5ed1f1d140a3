"""What reward workers said, as figures: of all samples, by domain and by component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from roll_gspo.rewards.base import RewardResult


def score_mean(results: Sequence[RewardResult]) -> float:
    """Of the samples that have a score; 0 of none."""
    scores = [result.score for result in results if result.failed is None]
    return sum(scores) / len(scores) if scores else 0.0


def num_failed(results: Sequence[RewardResult]) -> int:
    """Samples without a score."""
    return sum(result.failed is not None for result in results)


def domain_metrics(
    names: Sequence[str],
    domains: Sequence[str],
    results: Sequence[RewardResult],
    lengths: Sequence[int],
    family: str = "domain",
) -> dict[str, float]:
    """`<family>/<name>/{num_samples,failed,score_mean,response_length_mean}`, nothing where there is one domain only.

    Args:
        names: of all domains of the run; means of one without samples are left out.
        domains, results, lengths: of each sample; lengths in tokens.
        family: what the names begin with.
    """
    found: dict[str, float] = {}
    for name in names if len(names) > 1 else ():
        own = [index for index, domain in enumerate(domains) if domain == name]
        judged = [results[index] for index in own]
        failed = num_failed(judged)
        found[f"{family}/{name}/num_samples"] = float(len(own))
        found[f"{family}/{name}/failed"] = float(failed)
        if failed < len(own):
            found[f"{family}/{name}/score_mean"] = score_mean(judged)
        if own:
            found[f"{family}/{name}/response_length_mean"] = sum(lengths[index] for index in own) / len(own)
    return found


def component_metrics(results: Sequence[RewardResult], family: str = "reward/component") -> dict[str, float]:
    """`<family>/<component>`: the mean over the samples whose verdict has it."""
    parts: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.components.items():
            parts.setdefault(name, []).append(value)
    return {f"{family}/{name}": sum(values) / len(values) for name, values in parts.items()}


def count_by_domain(names: Sequence[str], domains: Sequence[str], quantity: str) -> Mapping[str, float]:
    """`domain/<name>/<quantity>`: how often each occurs; nothing where there is one domain only."""
    return {f"domain/{name}/{quantity}": float(domains.count(name)) for name in names if len(names) > 1}
