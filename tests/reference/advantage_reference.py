"""Scores to advantages, value loss, sample weights and filters once more, in plain Python floats and loops.

Written from the papers and the algorithm definitions, not from the product; nothing here imports it. Tables are lists
of rows; a row's mask says which tokens exist. Sums over time are written out as in the definitions, not as recurrences.
"""

from __future__ import annotations

import math

Row = list[float]
Table = list[Row]
Mask = list[list[bool]]


def bounded(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def mean_std(values: Row) -> tuple[float, float]:
    """Unbiased; std 0 of a single value, and exactly 0 of equal ones."""
    if len(set(values)) == 1:
        return values[0], 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def peers(i: int, groups: list[int]) -> list[int]:
    return [j for j, group in enumerate(groups) if group == groups[i]]


def normalised(scores: Row, groups: list[int], norm: str | None) -> Row:
    """`running` of the first rollout of a run is `batch`."""
    if norm is None:
        return list(scores)
    result = []
    for i, r in enumerate(scores):
        mean, std = mean_std([scores[j] for j in peers(i, groups)] if norm == "group" else scores)
        result.append((r - mean) / (std + 1e-6))
    return result


def times(mask: list[bool]) -> list[int]:
    """The positions of the valid tokens, in order."""
    return [t for t, valid in enumerate(mask) if valid]


def shaped_row(reward: float, mask: list[bool], penalties: Row) -> Row:
    """r_t of the valid tokens, in order: the reward on the last one, minus the penalty of each."""
    steps = times(mask)
    return [-penalties[t] + (reward if t == steps[-1] else 0.0) for t in steps]


def rewards_to_go(rewards: Row, gamma: float) -> Row:
    """`sum_l gamma^l r_t+l`."""
    return [math.fsum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def gae(rewards: Row, values: Row, gamma: float, lambd: float) -> Row:
    """Eq. 16 of arXiv 1506.02438, with V = 0 after the end."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * w - v for r, v, w in zip(rewards, values, after, strict=False)]
    return [math.fsum((gamma * lambd) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def placed(values: Row, mask: list[bool]) -> Row:
    """The values of the valid tokens, in order, at their positions; 0 elsewhere."""
    result = [0.0] * len(mask)
    for t, value in zip(times(mask), values, strict=True):
        result[t] = value
    return result


def per_sample(
    estimator: str, i: int, rewards: Row, totals: Row, kl: Row, groups: list[int], lengths: list[int], norm: str | None
) -> float:
    """The advantage of every token of sample i, for estimators that know no time."""
    group = peers(i, groups)
    others = [j for j in group if j != i]
    mean, std = mean_std([totals[j] for j in group])
    if estimator == "grpo":
        return totals[i] if norm == "group" else (totals[i] - mean) / (std + 1e-6)
    if estimator in ("dr_grpo", "reinforce_plus_plus_baseline"):
        return totals[i] - mean
    if estimator == "rloo":
        return totals[i] - math.fsum(totals[j] for j in others) / len(others) if others else 0.0
    if estimator == "opo":
        weight = sum(lengths[j] for j in group)
        return totals[i] - (math.fsum(lengths[j] * totals[j] for j in group) / weight if weight else mean)
    if estimator == "maxrl":
        mean = math.fsum(totals[j] for j in group) / len(group)
        return (totals[i] - mean) / mean if mean > 1e-6 else 0.0
    if estimator == "raft_plus_plus":
        best = max(rewards[j] for j in group)
        return 1.0 - kl[i] if rewards[i] == best and best > 0 else 0.0
    raise AssertionError(estimator)


def decoupled(parts: list[tuple[float, Row]], groups: list[int]) -> Row:
    """GDPO: each part over its group, their weighted sum over the rollout."""
    columns = [(weight, normalised(scores, groups, "group")) for weight, scores in parts]
    summed = [math.fsum(weight * column[i] for weight, column in columns) for i in range(len(groups))]
    return normalised(summed, groups, "batch")


def estimated(
    estimator: str,
    rewards: Row,
    groups: list[int],
    mask: Mask,
    penalties: Table,
    norm: str | None,
    gamma: float,
    lambd: float,
    values: Table,
    parts: list[tuple[float, Row]] | None,
) -> Table:
    """Advantages before whitening and clip."""
    shaped = [shaped_row(r, m, p) for r, m, p in zip(rewards, mask, penalties, strict=True)]
    if estimator in ("reinforce", "reinforce_plus_plus"):
        return [placed(rewards_to_go(row, gamma), m) for row, m in zip(shaped, mask, strict=True)]
    if estimator == "gae":
        critic = [[v[t] for t in times(m)] for v, m in zip(values, mask, strict=True)]
        return [placed(gae(row, v, gamma, lambd), m) for row, v, m in zip(shaped, critic, mask, strict=True)]
    totals, lengths = [math.fsum(row) for row in shaped], [sum(m) for m in mask]
    kl = [math.fsum(p[t] for t in times(m)) for p, m in zip(penalties, mask, strict=True)]
    result = []
    of_parts = decoupled(parts or [(1.0, rewards)], groups) if estimator == "gdpo" else None
    for i, m in enumerate(mask):
        advantage = (
            of_parts[i] - kl[i]
            if of_parts is not None
            else per_sample(estimator, i, rewards, totals, kl, groups, lengths, norm)
        )
        result.append([advantage if valid else 0.0 for valid in m])
    return result


def advantages(
    scores: Row,
    groups: list[int],
    mask: Mask,
    loss_mask: Mask,
    estimator: str,
    norm: str | None,
    gamma: float,
    lambd: float,
    values: Table,
    reward_clip: float | None,
    penalties: Table,
    whiten: bool,
    advantage_clip: float | None,
    parts: list[tuple[float, Row]] | None = None,
) -> tuple[Table, Table]:
    """(advantages, returns): normalise, clip, KL, estimate, whiten over the loss mask, clip.

    An estimator that compares samples is part of the normalisation, so that the first clip follows it.
    """
    rewards = normalised(scores, groups, norm)
    alone = estimator in ("reinforce", "reinforce_plus_plus", "gae")
    if reward_clip is not None and alone:
        rewards = [bounded(r, -reward_clip, reward_clip) for r in rewards]
    table = estimated(estimator, rewards, groups, mask, penalties, norm, gamma, lambd, values, parts)
    if reward_clip is not None and not alone:
        table = [[bounded(a, -reward_clip, reward_clip) for a in row] for row in table]
    returns = [
        [a + v if valid else 0.0 for a, v, valid in zip(*rows, strict=True)]
        for rows in zip(table, values, mask, strict=True)
    ]
    seen = [a for row, m in zip(table, loss_mask, strict=True) for a, keep in zip(row, m, strict=True) if keep]
    mean, std = 0.0, 1.0 - 1e-8
    if (whiten or estimator in ("reinforce_plus_plus", "reinforce_plus_plus_baseline")) and len(seen) > 1:
        mean, std = mean_std(seen)
    limit = math.inf if advantage_clip is None else advantage_clip
    finished = [
        [bounded((a - mean) / (std + 1e-8), -limit, limit) if keep else 0.0 for a, keep in zip(*rows, strict=True)]
        for rows in zip(table, loss_mask, strict=True)
    ]
    return finished, returns


def value_errors(values: Table, old: Table, returns: Table, mask: Mask, value_clip: float | None) -> list[Row]:
    """`0.5 max(...)` of the valid tokens of each sample (arXiv 2005.12729, section 3)."""
    result = []
    for v, o, r, m in zip(values, old, returns, mask, strict=True):
        row = []
        for t in times(m):
            error = (v[t] - r[t]) ** 2
            if value_clip is not None:
                error = max(error, (bounded(v[t], o[t] - value_clip, o[t] + value_clip) - r[t]) ** 2)
            row.append(0.5 * error)
        result.append(row)
    return result


def value_loss(errors: list[Row], mode: str, response_length: int) -> float:
    tokens, sequences = sum(len(row) for row in errors), sum(1 for row in errors if row)
    shares = {
        "token-mean": [math.fsum(row) / tokens for row in errors if row],
        "seq-mean-token-sum": [math.fsum(row) / sequences for row in errors if row],
        "seq-mean-token-mean": [math.fsum(row) / len(row) / sequences for row in errors if row],
        "seq-mean-token-sum-norm": [math.fsum(row) / response_length / sequences for row in errors if row],
    }
    return math.fsum(shares[mode])


def explained_variance(values: Row, returns: Row) -> float:
    """Compute GAE on flat lists of valid tokens."""
    error = mean_std([r - v for r, v in zip(returns, values, strict=True)])[1] if returns else 0.0
    spread = mean_std(returns)[1] if returns else 0.0
    return 1 - error**2 / spread**2 if spread else 0.0


def kept_by_difficulty(scores: Row, groups: list[int], low: float, high: float) -> list[bool]:
    means = [mean_std([scores[j] for j in peers(i, groups)])[0] for i in range(len(scores))]
    return [low < mean < high or len(peers(i, groups)) == 1 for i, mean in enumerate(means)]


def sample_weights(lengths: list[int], difficulty: Row | None, kept: list[bool], by_length: bool) -> Row:
    inside = [n for n, keep in zip(lengths, kept, strict=True) if keep]
    weights = []
    for i, keep in enumerate(kept):
        weight = 1.0 if keep else 0.0
        if keep and by_length and max(inside) > min(inside):
            weight *= 1.5 - (lengths[i] - min(inside)) / (max(inside) - min(inside))
        if keep and difficulty is not None:
            weight *= 0.5 + 1.5 * bounded(difficulty[i], 0, 1)
        weights.append(weight)
    mean = math.fsum(weights) / len(inside) if inside else 1.0
    return [weight / mean for weight in weights]


def overlong_penalty(length: int, longest: int, buffer: int, factor: float) -> float:
    """DAPO eq. 13, times the factor."""
    if length <= longest - buffer:
        return 0.0
    return factor * ((longest - buffer) - length) / buffer if length <= longest else -factor
