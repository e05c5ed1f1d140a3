"""Advantages of turns once more, in plain Python floats and loops.

Written from the definitions in docs/algorithms.md, not from the product; nothing here imports it. An episode is a list
of turns, and a turn is (reward, positions of its tokens, what it follows).
"""

from __future__ import annotations

import math

from reference import advantage_reference as samples

Turn = tuple[float, list[int], str]


def returns(episode: list[Turn], gamma: float) -> list[float]:
    """`G_t = sum_(s >= t) gamma^(s - t) r_s`."""
    rewards = [reward for reward, _, _ in episode]
    return [math.fsum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]


def compared_with(group: int, number: int, state: str, baseline: str) -> tuple[object, ...]:
    """Turns with equal results are compared with each other."""
    return {"group": (group,), "turn": (group, number), "state": (group, state)}[baseline]


def turn_advantages(
    episodes: list[list[Turn]],
    groups: list[int],
    width: int,
    estimator: str,
    norm: str | None,
    baseline: str,
    gamma: float,
    of_episode: float,
    of_turn: float,
    reward_clip: float | None,
) -> list[list[float]]:
    """`w_e` times the advantage of the episode plus `w_s` times that of the turn, on every token; before whitening."""
    listed = [(i, t) for i, episode in enumerate(episodes) for t in range(len(episode))]
    keys = [compared_with(groups[i], t, episodes[i][t][2], baseline) for i, t in listed]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    scores = [returns(episodes[i], gamma)[t] for i, t in listed]
    lengths = [len(episodes[i][t][1]) for i, t in listed]
    steps = estimates(scores, [numbers[key] for key in keys], lengths, estimator, norm, reward_clip)
    whole = [math.fsum(reward for reward, _, _ in episode) for episode in episodes]
    sizes = [sum(len(positions) for _, positions, _ in episode) for episode in episodes]
    totals = estimates(whole, groups, sizes, estimator, norm, reward_clip) if of_episode else [0.0] * len(episodes)
    table = [[0.0] * width for _ in episodes]
    for (i, t), step in zip(listed, steps, strict=True):
        for position in episodes[i][t][1]:
            table[i][position] = of_episode * totals[i] + of_turn * step
    return table


def estimates(
    scores: list[float],
    groups: list[int],
    lengths: list[int],
    estimator: str,
    norm: str | None,
    reward_clip: float | None,
) -> list[float]:
    """One advantage per row, as if each were a sample of `lengths` tokens."""
    alone = estimator in ("reinforce", "reinforce_plus_plus")
    rewards = samples.normalised(scores, groups, norm)
    if reward_clip is not None and alone:
        rewards = [samples.bounded(r, -reward_clip, reward_clip) for r in rewards]
    if alone:
        return rewards
    zeros = [0.0] * len(scores)
    found = [
        samples.per_sample(estimator, i, rewards, rewards, zeros, groups, lengths, norm) for i in range(len(scores))
    ]
    if reward_clip is None:
        return found
    return [samples.bounded(a, -reward_clip, reward_clip) for a in found]
