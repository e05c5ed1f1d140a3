"""The formulas once more, in plain Python floats and loops: what the tensor code is compared with.

Written from the papers and the algorithm definitions, not from the product; nothing here imports it.
Tables are lists of rows; a row's mask says which tokens exist.
"""

from __future__ import annotations

import math

Table = list[list[float]]
Mask = list[list[bool]]


def bounded(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def log_ratios(row: list[float], old: list[float], mask: list[bool]) -> list[float]:
    return [bounded(a - b, -20, 20) if m else 0.0 for a, b, m in zip(row, old, mask, strict=True)]


def ratios(log_probs: Table, old: Table, mask: Mask, level: str) -> Table:
    """GSPO eq. 7 (`seq`, and the value of `seq_token`), or the token ratio; 1 where masked."""
    result = []
    for lp, ol, ma in zip(log_probs, old, mask, strict=True):
        d = log_ratios(lp, ol, ma)
        n = sum(ma)
        if level == "token":
            result.append([math.exp(x) for x in d])
        else:
            s = math.exp(sum(d) / n) if n else 1.0
            result.append([s if m else 1.0 for m in ma])
    return result


def surrogate_loss(ratio: float, a: float, low: float, high: float, dual: float | None) -> float:
    """GSPO eq. 5 inside the expectation, for one token, negated; then the dual clip."""
    value = -min(ratio * a, bounded(ratio, 1 - low, 1 + high) * a)
    if dual is not None and a < 0:
        value = min(value, dual * abs(a))
    return value


def gradient_is_clipped(ratio: float, a: float, low: float, high: float) -> bool:
    return (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)


def aggregated(values: Table, mask: Mask, mode: str, response_length: int, weights: list[float]) -> float:
    """One of the four loss_agg_modes over a whole mini-batch."""
    lengths = [sum(m) for m in mask]
    num_tokens, num_sequences = sum(lengths), sum(1 for n in lengths if n)
    total = 0.0
    for row, m, n, w in zip(values, mask, lengths, weights, strict=True):
        if not n:
            continue
        inside = sum(x for x, keep in zip(row, m, strict=True) if keep)
        if mode == "token-mean":
            total += w * inside / num_tokens
        elif mode == "seq-mean-token-sum":
            total += w * inside / num_sequences
        elif mode == "seq-mean-token-mean":
            total += w * inside / n / num_sequences
        elif mode == "seq-mean-token-sum-norm":
            total += w * inside / (num_sequences * response_length)
        else:
            raise AssertionError(mode)
    return total


def kl(d: float, kind: str) -> float:
    if kind == "kl":
        return d
    if kind == "abs":
        return abs(d)
    if kind == "mse":
        return d * d / 2
    return 10.0 if abs(d) > 20 else min(math.exp(-d) - 1 + d, 10.0)


def kl_table(log_probs: Table, ref: Table, mask: Mask, kind: str) -> Table:
    return [
        [kl(a - b, kind) if m else 0.0 for a, b, m in zip(*rows, strict=True)]
        for rows in zip(log_probs, ref, mask, strict=True)
    ]


def policy_loss(
    log_probs: Table,
    old: Table,
    advantages: Table,
    mask: Mask,
    level: str,
    low: float,
    high: float,
    dual: float | None,
    mode: str,
    response_length: int,
) -> float:
    """The clipped policy-gradient loss of a whole mini-batch."""
    rho = ratios(log_probs, old, mask, level)
    values = [
        [surrogate_loss(r, a, low, high, dual) for r, a in zip(*rows, strict=True)]
        for rows in zip(rho, advantages, strict=True)
    ]
    return aggregated(values, mask, mode, response_length, [1.0] * len(mask))


def mean_std(values: list[float]) -> tuple[float, float]:
    """Unbiased; std 0 of a single value, and exactly 0 of equal ones."""
    if len(set(values)) == 1:
        return values[0], 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def normalised(scores: list[float], groups: list[int], norm: str | None, form: str = "both") -> list[float]:
    """`form`: both, shift, scale. `running` of the first rollout of a run is `batch`."""
    if norm is None:
        return list(scores)
    result = []
    for r, g in zip(scores, groups, strict=True):
        peers = [s for s, h in zip(scores, groups, strict=True) if h == g or norm != "group"]
        mean, std = mean_std(peers)
        if form != "scale":
            r -= mean
        result.append(r if form == "shift" else r / (std + 1e-6))
    return result


def baseline(i: int, totals: list[float], groups: list[int], estimator: str) -> float:
    """Return the baseline of sample i: the mean of its group, for `rloo` without itself."""
    peers = [j for j, group in enumerate(groups) if group == groups[i] and (estimator != "rloo" or j != i)]
    return math.fsum(totals[j] for j in peers) / len(peers) if peers else totals[i]


def advantages(
    scores: list[float],
    groups: list[int],
    mask: Mask,
    estimator: str,
    norm: str | None,
    gamma: float,
    reward_clip: float | None,
    penalties: Table,
    whiten: bool,
    advantage_clip: float | None,
) -> Table:
    """Normalise, clip, KL, estimate, whiten, clip."""
    rewards = normalised(scores, groups, norm)
    if reward_clip is not None:
        rewards = [bounded(r, -reward_clip, reward_clip) for r in rewards]
    table = []
    for r, m, p in zip(rewards, mask, penalties, strict=True):
        row = [-x if keep else 0.0 for x, keep in zip(p, m, strict=True)]
        if any(m):
            row[max(t for t, keep in enumerate(m) if keep)] += r
        table.append(row)
    if estimator != "reinforce":
        totals = [math.fsum(row) for row in table]
        if estimator == "grpo" and norm != "group":
            totals = normalised(totals, groups, "group")
        elif estimator != "grpo":
            totals = [total - baseline(i, totals, groups, estimator) for i, total in enumerate(totals)]
        table = [[a if keep else 0.0 for keep in m] for a, m in zip(totals, mask, strict=True)]
    else:
        for row, m in zip(table, mask, strict=True):
            following = 0.0
            for t in reversed(range(len(row))):
                if m[t]:
                    following = row[t] + gamma * following
                    row[t] = following
    valid = [a for row, m in zip(table, mask, strict=True) for a, keep in zip(row, m, strict=True) if keep]
    if whiten and len(valid) > 1:
        mean, std = mean_std(valid)
        table = [
            [(a - mean) / (std + 1e-8) if keep else 0.0 for a, keep in zip(row, m, strict=True)]
            for row, m in zip(table, mask, strict=True)
        ]
    if advantage_clip is not None:
        table = [[bounded(a, -advantage_clip, advantage_clip) for a in row] for row in table]
    return table


def effective_sample_fraction(old: Table, rollout: Table, mask: Mask) -> float:
    weights = [
        math.exp(bounded(sum(a - b for a, b, m in zip(*rows, strict=True) if m), -20, 20))
        for rows in zip(old, rollout, mask, strict=True)
        if any(rows[2])
    ]
    return sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
