"""Which metrics are drawn, and how."""

from __future__ import annotations

from dataclasses import dataclass

from roll_gspo.compare.spread import Axis

SCORE = ("rollout/score_mean", "reward/score_mean")  # of all samples, else of those that dynamic sampling kept
VALIDATION = ("validation/score_mean",)


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        name: stem of its files.
        title: above it.
        y_label: quantity and unit.
        metrics: the first one that a run has is drawn.
        axis: what it is drawn against.
        note: one sentence below it on the page.
        log: a logarithmic vertical axis; what is 0 lies at its lower edge.
        sparse: measured at few steps, each run's figures are drawn as dots.
        smooth: noisy; drawn as the mean of the latest few steps.
    """

    name: str
    title: str
    y_label: str
    metrics: tuple[str, ...]
    note: str = ""
    axis: Axis = Axis.STEPS
    log: bool = False
    sparse: bool = False
    smooth: bool = False


def _against_every_cost(name: str, title: str, y_label: str, metrics: tuple[str, ...], sparse: bool) -> list[Panel]:
    notes = {
        Axis.STEPS: "",
        Axis.TOKENS: "At equal numbers of generated response tokens, those of dropped groups included.",
        Axis.TIME: "At equal time as the runs took it, validation included; other work on the machine counts.",
    }
    return [
        Panel(f"{name}_{axis}", title, y_label, metrics, notes[axis], axis, sparse=sparse, smooth=not sparse)
        for axis in Axis
    ]


LEARNING = (
    *_against_every_cost("reward", "Training reward", "mean score of the step's samples", SCORE, sparse=False),
    *_against_every_cost("accuracy", "Held-out accuracy", "mean score, validation set", VALIDATION, sparse=True),
)
UPDATES = (
    Panel(
        "clip_fraction",
        "Clipped tokens",
        "fraction of response tokens",
        ("actor/clip_fraction",),
        "Tokens whose gradient the clip takes away; with a sequence ratio all tokens of a clipped sequence.",
        log=True,
    ),
    Panel(
        "ratio_deviation",
        "Deviation of the importance ratio",
        "mean |ratio − 1|",
        ("actor/ratio_deviation",),
        "Of the ratio that is clipped: of each token, or of the whole sequence (length-normalised).",
        log=True,
    ),
    Panel("entropy", "Entropy", "nats a token", ("actor/entropy",), "Of the next-token distribution of the policy."),
    Panel("response_length", "Response length", "tokens", ("rollout/response_length_mean",), "Mean over the samples."),
    Panel(
        "grad_norm",
        "Gradient norm",
        "global L2 norm",
        ("actor/grad_norm",),
        "Before clipping; it scales with the aggregation of the loss.",
        log=True,
    ),
    Panel(
        "kl_reference",
        "KL to the reference",
        "nats a token",
        ("actor/kl_ref",),
        "From the policy before training.",
    ),
)
# Drawn where a run has them and they ever change.
OTHERS = (
    Panel("approx_kl", "KL to the old policy", "nats a token", ("actor/approx_kl",), log=True),
    Panel("flat_groups", "Groups without spread", "fraction of groups", ("reward/groups_without_spread",)),
    Panel("truncated", "Responses cut at the limit", "fraction of samples", ("rollout/truncated_fraction",)),
    Panel("masked", "Masked samples", "fraction of samples", ("actor/masked_fraction",)),
    Panel("groups_dropped", "Groups dropped and refilled", "groups a step", ("sampling/groups_dropped",)),
    Panel("tokens_dropped", "Tokens of dropped groups", "tokens a step", ("sampling/tokens_dropped",)),
    Panel("mismatch", "Trainer against engine", "mean |Δ log-prob|, nats", ("mismatch/log_prob_diff_mean",), log=True),
    Panel("correction", "Corrected weights at a bound", "fraction", ("correction/bounded_fraction",)),
    Panel(
        "routing_rollout",
        "Experts: engine against trainer",
        "fraction that differs",
        ("routing/rollout_mismatch",),
    ),
    Panel("routing_update", "Experts: before and after updates", "fraction that differs", ("routing/update_shift",)),
    Panel("routing_replayed", "Replayed routes", "fraction of tokens", ("routing/replayed_fraction",)),
    Panel("critic_loss", "Critic loss", "loss", ("critic/loss",), log=True),
    Panel("critic_variance", "Variance that the critic explains", "fraction", ("critic/explained_variance",)),
    Panel("kl_coefficient", "KL coefficient", "coefficient", ("kl/coef",)),
)
