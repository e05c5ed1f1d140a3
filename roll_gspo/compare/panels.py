"""The panels of a comparison: which metrics are drawn, against what, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roll_gspo.compare.seed_spread import XAxis
from roll_gspo.report.run_folder import SCORE, VALIDATION


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        name: stem of its files.
        title: above the plot.
        y_label: quantity and unit.
        metrics: the first one that a run has is drawn.
        note: one sentence below the plot on the page.
        x_axis: quantity of the horizontal axis.
        log: use a logarithmic vertical axis, which shows values of 0 at its lower edge.
        sparse: measured at few steps; each run's values are drawn as dots.
        smooth: draw the trailing mean of a noisy metric.
    """

    name: str
    title: str
    y_label: str
    metrics: tuple[str, ...]
    note: str = ""
    x_axis: XAxis = XAxis.STEPS
    log: bool = False
    sparse: bool = False
    smooth: bool = False


def _panel_per_x_axis(name: str, title: str, y_label: str, metrics: tuple[str, ...], sparse: bool) -> list[Panel]:
    notes = {
        XAxis.STEPS: "",
        XAxis.TOKENS: "Number of generated response tokens, including those of dropped groups.",
        XAxis.TIME: "Time of all steps, including validation. Other load on the machine changes it.",
    }
    return [
        Panel(f"{name}_{axis}", title, y_label, metrics, notes[axis], axis, sparse=sparse, smooth=not sparse)
        for axis in XAxis
    ]


LEARNING = (
    *_panel_per_x_axis("reward", "Training reward", "mean score per step", SCORE, sparse=False),
    *_panel_per_x_axis("accuracy", "Held-out accuracy", "mean score, validation set", VALIDATION, sparse=True),
)
UPDATES = (
    Panel(
        "clip_fraction",
        "Clipped tokens",
        "fraction of response tokens",
        ("actor/clip_fraction",),
        "Tokens whose gradient is clipped. With a sequence ratio, all tokens of a clipped sequence count.",
        log=True,
    ),
    Panel(
        "ratio_deviation",
        "Deviation of the importance ratio",
        "mean |ratio − 1|",
        ("actor/ratio_deviation",),
        "The ratio that is clipped: per token, or per sequence (length-normalized).",
        log=True,
    ),
    Panel("entropy", "Entropy", "nats per token", ("actor/entropy",), "Entropy of the next-token distribution."),
    Panel("response_length", "Response length", "tokens", ("rollout/response_length_mean",), "Mean over the samples."),
    Panel(
        "grad_norm",
        "Gradient norm",
        "global L2 norm",
        ("actor/grad_norm",),
        "Before clipping. It depends on the aggregation of the loss.",
        log=True,
    ),
    Panel(
        "kl_reference",
        "KL to the reference",
        "nats per token",
        ("actor/kl_ref",),
        "The reference is the policy before training.",
    ),
)
# Drawn if a run logs the metric and its value changes.
OTHERS = (
    Panel("approx_kl", "KL to the old policy", "nats per token", ("actor/approx_kl",), log=True),
    Panel("flat_groups", "Groups without spread", "fraction of groups", ("reward/groups_without_spread",)),
    Panel("truncated", "Truncated responses", "fraction of samples", ("rollout/truncated_fraction",)),
    Panel("masked", "Masked samples", "fraction of samples", ("actor/masked_fraction",)),
    Panel("groups_dropped", "Groups dropped and resampled", "groups per step", ("sampling/groups_dropped",)),
    Panel("tokens_dropped", "Tokens of dropped groups", "tokens per step", ("sampling/tokens_dropped",)),
    Panel("mismatch", "Trainer against engine", "mean |Δ log-prob|, nats", ("mismatch/log_prob_diff_mean",), log=True),
    Panel("correction", "Correction weights at a bound", "fraction", ("correction/bounded_fraction",)),
    Panel("routing_rollout", "Experts: engine against trainer", "fraction that differs", ("routing/rollout_mismatch",)),
    Panel("routing_update", "Experts: before and after updates", "fraction that differs", ("routing/update_shift",)),
    Panel("routing_replayed", "Replayed routes", "fraction of tokens", ("routing/replayed_fraction",)),
    Panel("critic_loss", "Critic loss", "loss", ("critic/loss",), log=True),
    Panel("critic_variance", "Explained variance of the critic", "fraction", ("critic/explained_variance",)),
    Panel("kl_coefficient", "KL coefficient", "coefficient", ("kl/coef",)),
)


def other_panels(names: Sequence[str]) -> list[Panel]:
    """Return a panel for each of the metrics, which are in no other panel."""
    return [Panel(name, name, name.rpartition("/")[2], (name,)) for name in names]
