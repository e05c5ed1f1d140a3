"""The policy losses, their gradients and the correction weights once more, in plain Python floats and loops.

Written from the papers (arXiv 1707.06347, 2507.18071, 2506.13585, 2507.20673, 2511.20347, 2503.14286, 2510.18855,
2509.09177, 2602.10693, 2602.04879) and the algorithm definitions, not from the product; nothing here imports it.
Gradients are derived by hand, with every stop-gradient taken as a constant, which finite differences cannot do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from reference.gspo_reference import Mask, Table, aggregated, bounded

Row = list[float]


@dataclass(frozen=True)
class Objective:
    """The choices, with the names of the YAML."""

    importance_sampling: str
    policy_loss: str = "clip"
    low: float = 0.2
    high: float = 0.27
    dual: float | None = None
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    length_scaling: bool = False
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    divergence: str = "tv"
    threshold: float = 0.15


def runs(mask: list[bool]) -> list[list[int]]:
    """Positions of every contiguous run of a row's mask."""
    found: list[list[int]] = []
    for t, m in enumerate(mask):
        if m and (t == 0 or not mask[t - 1]):
            found.append([])
        if m:
            found[-1].append(t)
    return found


def log_ratio(new: float, old: float) -> tuple[float, float]:
    """Clamped `d`, and its derivative by `new`."""
    return bounded(new - old, -20, 20), float(abs(new - old) < 20)


def ratio_and_derivative(d: Row, slope: Row, mask: list[bool], level: str) -> tuple[Row, Table]:
    """The ratio of every token of a row, and its derivative [t][j] by log-probability j."""
    width, valid = len(d), [t for t, m in enumerate(mask) if m]
    rho, derivative = [1.0] * width, [[0.0] * width for _ in range(width)]
    groups = {"token": [[t] for t in valid], "segment": runs(mask)}.get(level, [valid] if valid else [])
    for group in groups:
        value = math.exp(math.fsum(d[t] for t in group) / len(group))
        for t in group:
            rho[t] = value
            if level == "seq_token":
                derivative[t][t] = value * slope[t]
            else:
                for j in group:
                    derivative[t][j] = value * slope[j] / len(group)
    return rho, derivative


def of_the_ratio(rho: float, a: float, chosen: Objective, length: int) -> tuple[float, float]:
    """Loss of a token of `clip` or `sapo`, and its derivative by the ratio."""
    if chosen.policy_loss == "sapo":
        tau = chosen.tau_positive if a > 0 else chosen.tau_negative
        gate = 1 / (1 + math.exp(-tau * (rho - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * a
    value, slope = -rho * a, -a
    lowest, highest = 1 - chosen.low, 1 + chosen.high
    if chosen.length_scaling:
        lowest, highest = math.exp(-chosen.low / length**0.5), math.exp(chosen.high / length**0.5)
    if (a > 0 and rho > highest) or (a < 0 and rho < lowest):
        value, slope = -bounded(rho, lowest, highest) * a, 0.0
    if chosen.dual is not None and a < 0 and value > -chosen.dual * a:
        return -chosen.dual * a, 0.0
    return value, slope


def row_loss(new: Row, old: Row, a: Row, mask: list[bool], chosen: Objective) -> tuple[Row, Table]:
    """Loss of every token of a row, and its derivative [t][j] by log-probability j; 0 where masked."""
    width, valid = len(new), [t for t, m in enumerate(mask) if m]
    pairs = [log_ratio(n, o) if m else (0.0, 0.0) for n, o, m in zip(new, old, mask, strict=True)]
    d, slope = [p[0] for p in pairs], [p[1] for p in pairs]
    rho, by_ratio = ratio_and_derivative(d, slope, mask, chosen.importance_sampling)
    loss, derivative = [0.0] * width, [[0.0] * width for _ in range(width)]
    for t in valid:
        if chosen.policy_loss in ("clip", "sapo"):
            loss[t], outer = of_the_ratio(rho[t], a[t], chosen, len(valid))
            derivative[t] = [outer * inner for inner in by_ratio[t]]
        elif chosen.policy_loss == "cispo":
            weight = bounded(rho[t], 1 - chosen.low, 1 + chosen.high)
            loss[t], derivative[t][t] = -weight * a[t] * new[t], -weight * a[t]
        elif chosen.policy_loss == "topr":
            whole = max(math.fsum(d), -20)
            weight = 1.0 if a[t] >= 0 else min(math.exp(min(whole, 1.0)), 1.0)
            loss[t], derivative[t][t] = -weight * a[t] * new[t], -weight * a[t]
        elif chosen.policy_loss == "vespo":
            k, decay = chosen.vespo_positive if a[t] >= 0 else chosen.vespo_negative
            whole = bounded(math.fsum(d), -20, 20)
            weight = math.exp(k * whole + decay * (1 - math.exp(whole)))
            loss[t], derivative[t][t] = -weight * a[t] * new[t], -weight * a[t]
        elif chosen.policy_loss == "fspo":
            loss[t], derivative[t] = band_of_the_sum(d, slope, a[t], len(valid), chosen)
        elif chosen.policy_loss == "dppo":
            if not has_left_the_region(new[t], new[t] - d[t], a[t], chosen):
                loss[t] = -rho[t] * a[t]
                derivative[t] = [-a[t] * inner for inner in by_ratio[t]]
        else:
            loss[t], derivative[t] = geometric_mean(d, slope, a, t, valid, chosen)
    return loss, derivative


def geometric_mean(d: Row, slope: Row, a: Row, t: int, valid: list[int], chosen: Objective) -> tuple[float, Row]:
    """GMPO for token t: the product of the token ratios, each clipped by the sign of its advantage, to the 1/n."""
    product, free = 1.0, [0.0] * len(d)
    for j in valid:
        r = math.exp(d[j])
        held = (a[j] > 0 and r > 1 + chosen.high) or (a[j] < 0 and r < 1 - chosen.low)
        product *= (bounded(r, 1 - chosen.low, 1 + chosen.high) if held else r) ** (1 / len(valid))
        free[j] = 0.0 if held else slope[j] / len(valid)
    return -product * a[t], [-product * a[t] * f for f in free]


def band_of_the_sum(d: Row, slope: Row, a: float, length: int, chosen: Objective) -> tuple[float, Row]:
    """FSPO: the log-ratio of the response is clipped to a band that grows with the root of its length."""
    total = math.fsum(d)
    whole = bounded(total, -20, 20)
    lowest, highest = -chosen.low * length**0.5, chosen.high * length**0.5
    if (a > 0 and whole > highest) or (a < 0 and whole < lowest):
        return -math.exp(bounded(whole, lowest, highest)) * a, [0.0] * len(d)
    inside = float(abs(total) < 20)
    return -math.exp(whole) * a, [-math.exp(whole) * a * s * inside for s in slope]


def has_left_the_region(new: float, old: float, a: float, chosen: Objective) -> bool:
    """DPPO: the probability has moved with the advantage, and the two-event divergence is above the threshold."""
    new, old = min(new, 0.0), min(old, 0.0)
    p, q = math.exp(new), math.exp(old)
    if (p - q) * a <= 0:
        return False
    if chosen.divergence == "tv":
        return abs(p - q) > chosen.threshold
    rest_p, rest_q = -math.expm1(new), -math.expm1(old)
    kl = q * (old - new)
    if rest_q > 0:
        kl += rest_q * math.log(rest_q / rest_p) if rest_p > 0 else math.inf
    return kl > chosen.threshold


def correction(old: Table, rollout: Table, mask: Mask, level: str, mode: str, low: float, high: float) -> Table:
    """Weights [B][T] of the token losses, 1 where masked."""
    table = []
    for o, r, m in zip(old, rollout, mask, strict=True):
        d = [a - b if keep else 0.0 for a, b, keep in zip(o, r, m, strict=True)]
        total, n = math.fsum(d), sum(m)
        exponents = {"token": d, "sequence": [total] * len(d), "geometric": [total / n if n else 0.0] * len(d)}[level]
        row = []
        for x, keep in zip(exponents, m, strict=True):
            w = math.exp(bounded(x, -20, 20))
            kept = bounded(w, low, high) if mode == "truncate" else w if low <= w <= high else 0.0
            row.append(kept if keep else 1.0)
        table.append(row)
    return table


def loss_and_gradient(
    new: Table,
    old: Table,
    a: Table,
    mask: Mask,
    chosen: Objective,
    mode: str,
    response_length: int,
    sample_weights: list[float],
    token_weights: Table,
) -> tuple[float, Table]:
    """The policy-gradient loss of a mini-batch and its gradient by every log-probability."""
    values, gradient = [], []
    for i, row in enumerate(zip(new, old, a, mask, token_weights, strict=True)):
        loss, derivative = row_loss(*row[:4], chosen)
        values.append([w * x for w, x in zip(row[4], loss, strict=True)])
        # The aggregation is linear: what a unit in each single token of this sample is worth.
        width, worth = len(loss), []
        for t in range(width):
            unit = [[0.0] * width for _ in mask]
            unit[i][t] = row[4][t]
            worth.append(aggregated(unit, mask, mode, response_length, sample_weights))
        gradient.append([math.fsum(worth[t] * derivative[t][j] for t in range(width)) for j in range(width)])
    return aggregated(values, mask, mode, response_length, sample_weights), gradient
