"""Metrics of stale samples by name, part of the table in `names.py`: (meaning, unit, reduction)."""

from __future__ import annotations

_TOKENS = "mean over response tokens"
_TOKENS_OF_LAG = "mean over response tokens of this lag"
_UPDATES = "over the optimizer steps"

STALENESS_METRICS: dict[str, tuple[str, str, str]] = {
    "staleness/mean": (
        "Lag of the sampled tokens: version of the trainer's weights before the update minus the version that sampled "
        "the token.",
        "versions",
        _TOKENS,
    ),
    "staleness/max": ("Largest lag.", "versions", "max over response tokens"),
    "staleness/sample_max_mean": ("Lag of the oldest token of a sample.", "versions", "mean over samples"),
    "staleness/ess": (
        "Effective sample size of the weights old policy / generation engine before any bound, over their number. The "
        "level is that of `train_infer_correction`, else `sequence`.",
        "fraction",
        "value of the step",
    ),
    "staleness/gate_closed": ("1 if `staleness/ess` is below `staleness_gate.min_ess`.", "0 or 1", "value of the step"),
}

STALENESS_PATTERNS: dict[str, tuple[str, str, str]] = {
    "staleness/share_<n>": ("Response tokens with lag n.", "fraction", _TOKENS),
    "staleness/log_prob_diff_mean_lag_<lag>": (
        "|log-probability of the old policy - of the generation engine|.",
        "nats",
        _TOKENS_OF_LAG,
    ),
    "staleness/kl_lag_<lag>": (
        "KL(generation engine || old policy), k3 estimate. With lag 0 it is the mismatch of the engines, else it "
        "includes the training since then.",
        "nats per token",
        _TOKENS_OF_LAG,
    ),
    "staleness/ess_lag_<lag>": ("`staleness/ess` of the tokens of this lag.", "fraction", "value of the step"),
    "actor/clip_fraction_lag_<lag>": ("`actor/clip_fraction` of the tokens of this lag.", "fraction", _TOKENS_OF_LAG),
    "actor/ratio_min_lag_<lag>": ("Smallest importance ratio of the tokens of this lag.", "ratio", f"min {_UPDATES}"),
    "actor/ratio_max_lag_<lag>": ("Largest importance ratio of the tokens of this lag.", "ratio", f"max {_UPDATES}"),
    "actor/ratio_tail_lag_<lag>": (
        "Tokens whose importance ratio is outside of twice the clip range, [1 - 2 low, 1 + 2 high].",
        "fraction",
        _TOKENS_OF_LAG,
    ),
}
