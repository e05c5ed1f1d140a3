"""Staleness once more in plain Python: metrics per lag, and the decoupled objective of AReaL from its formula."""

from __future__ import annotations

import math

from reference.gspo_reference import Mask, Table, bounded


def effective_sample_size(weights: list[float]) -> float:
    return math.fsum(weights) ** 2 / math.fsum(w * w for w in weights) / len(weights)


def weights_of(old: Table, rollout: Table, mask: Mask, level: str) -> list[float]:
    """Importance weights old / rollout of the tokens, or of the samples with a token."""
    found = []
    for o, r, m in zip(old, rollout, mask, strict=True):
        d = [a - b for a, b, keep in zip(o, r, m, strict=True) if keep]
        if level == "token":
            found += [math.exp(bounded(x, -20, 20)) for x in d]
        elif d:
            total = math.fsum(d) if level == "sequence" else math.fsum(d) / len(d)
            found.append(math.exp(bounded(total, -20, 20)))
    return found


def metrics_by_lag(
    old: Table,
    rollout: Table,
    mask: Mask,
    buckets: list[list[int]],
    ratio: Table,
    clipped: Mask,
    names: tuple[str, ...],
    level: str,
    low: float,
    high: float,
) -> dict[str, float]:
    metrics = {"staleness/ess": effective_sample_size(weights_of(old, rollout, mask, level))}
    for index, name in enumerate(names):
        inside = [[m and b == index for m, b in zip(*rows, strict=True)] for rows in zip(mask, buckets, strict=True)]
        tokens = [(i, t) for i, row in enumerate(inside) for t, keep in enumerate(row) if keep]
        if not tokens:
            continue
        d = [old[i][t] - rollout[i][t] for i, t in tokens]
        rho = [ratio[i][t] for i, t in tokens]
        n = len(tokens)
        metrics |= {
            f"staleness/log_prob_diff_mean_lag_{name}": math.fsum(abs(x) for x in d) / n,
            f"staleness/kl_lag_{name}": math.fsum(min(math.exp(x) - 1 - x, 10.0) for x in d) / n,
            f"staleness/ess_lag_{name}": effective_sample_size(weights_of(old, rollout, inside, level)),
            f"actor/clip_fraction_lag_{name}": sum(clipped[i][t] for i, t in tokens) / n,
            f"actor/ratio_min_lag_{name}": min(rho),
            f"actor/ratio_max_lag_{name}": max(rho),
            f"actor/ratio_tail_lag_{name}": sum(not 1 - 2 * low <= x <= 1 + 2 * high for x in rho) / n,
        }
    return metrics


def decoupled_objective(
    new: Table,
    proximal: Table,
    behaviour: Table,
    a: Table,
    mask: Mask,
    low: float,
    high: float,
    bound: float,
    mode: str,
) -> tuple[float, Table]:
    """Return value and gradient of the mean of `w min(u A, clip(u, 1 - low, 1 + high) A)` (arXiv 2505.24298, 5.2).

    `u = pi / pi_proximal` is the ratio that the clip bounds. `w = min(pi_proximal / pi_behaviour, bound)` is constant.
    """
    num_tokens, num_sequences = sum(map(sum, mask)), sum(any(row) for row in mask)
    value, gradient = 0.0, []
    for row in zip(new, proximal, behaviour, a, mask, strict=True):
        slopes, length = [], sum(row[4])
        for pi, prox, behav, advantage, keep in zip(*row, strict=True):
            if not keep:
                slopes.append(0.0)
                continue
            u, w = math.exp(pi - prox), min(math.exp(prox - behav), bound)
            scale = w / num_tokens if mode == "token-mean" else w / length / num_sequences
            inside, outside = u * advantage, bounded(u, 1 - low, 1 + high) * advantage
            value += scale * min(inside, outside)
            slopes.append(scale * u * advantage if inside <= outside else 0.0)
        gradient.append(slopes)
    return value, gradient
