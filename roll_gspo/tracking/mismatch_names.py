"""Metrics of equal weights by name, part of the table in `names.py`: (meaning, unit, reduction)."""

from __future__ import annotations

_TOKENS = "mean over response tokens"
_STEP = "value of the step"
_LEVEL = "root mean square over responses or tokens, the level of the loss"

NOISE_METRICS: dict[str, tuple[str, str, str]] = {
    "actor/ratio_noise": (
        "|log of the importance ratio| in the first mini-batch of the update, whose policy has not moved. It should be "
        "0; rounding makes it differ. Logged if the trainer recomputed the old log-probs, else see "
        "`mismatch/ratio_rms`. With `pg_clip_length_scaling` and `fspo`, the log-ratio that the range bounds.",
        "log-ratio",
        _LEVEL,
    ),
    "actor/clip_distance": (
        "Distance of the nearer clip bound from a ratio of 1, to compare `actor/ratio_noise` and `mismatch/ratio_rms` "
        "with. The run warns above a third of it.",
        "log-ratio",
        _STEP,
    ),
}

MISMATCH_METRICS: dict[str, tuple[str, str, str]] = {
    "mismatch/log_prob_diff_mean": (
        "|log-probability of the trainer - of the generation engine|, same weights. Only tokens with lag 0 count in "
        "`mismatch/*`.",
        "nats",
        _TOKENS,
    ),
    "mismatch/log_prob_diff_max": ("Largest such difference.", "nats", "max over response tokens"),
    "mismatch/kl": ("KL(generation engine || trainer), k3 estimate.", "nats per token", _TOKENS),
    "mismatch/ess": (
        "Effective sample size of the weights trainer / generation engine; 1 is a perfect match.",
        "fraction",
        _STEP,
    ),
    "mismatch/ratio_rms": (
        "|log of the ratio trainer / generation engine|, same weights, samples without a stale token. Without the "
        "recompute of old log-probs, it is measured in the first mini-batch of the update.",
        "log-ratio",
        _LEVEL,
    ),
}
