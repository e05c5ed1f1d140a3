"""Metrics of turns by name, part of the table in `names.py`: (meaning, unit, reduction)."""

from __future__ import annotations

CREDIT_METRICS: dict[str, tuple[str, str, str]] = {
    "reward/turn_mean": ("Reward of a turn. Logged with `credit: turn`.", "score", "mean over turns"),
    "reward/turn_groups_without_spread": (
        "Sets of turns that `turn_baseline` compares and whose returns are all equal. Estimators that compare turns "
        "give them advantage 0. Logged with `credit: turn`.",
        "fraction",
        "mean over sets of turns",
    ),
    "advantage/turn_std": (
        "Distance of a turn's advantage from the mean of the turns of its episode, before whitening. 0: all turns of "
        "an episode have the same. Logged with `credit: turn`.",
        "advantage",
        "root mean square over turns",
    ),
}
