"""The charts of a run's report: reward, known metrics, stage times, all other metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from roll_gspo.report.chart_cards import ChartCards, key
from roll_gspo.report.charts import Chart, LineStyle, Series
from roll_gspo.report.families import family_charts, family_metrics
from roll_gspo.report.html_page import cards, plural
from roll_gspo.report.numbers import format_duration
from roll_gspo.report.run_folder import SCORE, VALIDATION, RunFolder

_MAX_BARS = 150
_MAX_STAGES = 7
_LINE, _FAINT, _DOTS, _ = LineStyle
_Row = tuple[str, str, int, LineStyle]

# (title, note, y_label, ((label, metric, color, style), ...), logarithmic, filled between first and last).
CHARTS: tuple[tuple[str, str, str, tuple[_Row, ...], bool, bool], ...] = (
    (
        "Supervised loss",
        "Negative log-likelihood of the target tokens.",
        "nats per token",
        (("step", "sft/loss", 0, _LINE), ("validation", "validation/loss", 1, _DOTS)),
        False,
        False,
    ),
    (
        "Clip fraction",
        "Share whose gradient is clipped.",
        "fraction",
        (("tokens", "actor/clip_fraction", 0, _LINE), ("sequences", "actor/clip_fraction_sequence", 1, _LINE)),
        True,
        False,
    ),
    (
        "Importance ratio",
        "Current policy over old policy: minimum, mean and maximum.",
        "current / old policy",
        (
            ("min", "actor/ratio_min", 0, _FAINT),
            ("mean", "actor/ratio_mean", 0, _LINE),
            ("max", "actor/ratio_max", 0, _FAINT),
        ),
        False,
        True,
    ),
    (
        "Ratio noise",
        "Log-ratio at equal weights, where it should be 0. Above a third of the clip range, rounding decides what is "
        "clipped.",
        "RMS of the log-ratio",
        (
            ("trainer, two passes", "actor/ratio_noise", 0, _LINE),
            ("trainer over engine", "mismatch/ratio_rms", 1, _LINE),
            ("clip range", "actor/clip_distance", 3, _FAINT),
        ),
        True,
        False,
    ),
    (
        "KL divergence",
        "To the old policy and to the reference.",
        "nats per token",
        (("old policy", "actor/approx_kl", 0, _LINE), ("reference", "actor/kl_ref", 1, _LINE)),
        True,
        False,
    ),
    (
        "Entropy",
        "Entropy of the next-token distribution.",
        "nats per token",
        (("entropy", "actor/entropy", 0, _LINE),),
        False,
        False,
    ),
    (
        "Response length",
        "Mean and maximum over the samples.",
        "tokens",
        (("mean", "rollout/response_length_mean", 0, _LINE), ("max", "rollout/response_length_max", 1, _FAINT)),
        False,
        False,
    ),
    (
        "Turns per episode",
        "Answers of the model, over the episodes that did not fail.",
        "turns",
        (("mean", "episode/turns_mean", 0, _LINE), ("max", "episode/turns_max", 1, _FAINT)),
        False,
        False,
    ),
    (
        "Given tokens and invalid turns",
        "Share of the tokens that environments gave, and of the answers that they could not understand.",
        "fraction",
        (
            ("given tokens", "episode/given_tokens_fraction", 0, _LINE),
            ("invalid turns", "episode/invalid_turns", 1, _LINE),
        ),
        False,
        False,
    ),
    (
        "Environment time hidden behind generation",
        "Share of the seconds of environments in which the engines sampled other answers.",
        "fraction",
        (("hidden", "environment/hidden_share", 0, _LINE),),
        False,
        False,
    ),
    ("Gradient norm", "Before clipping.", "global L2 norm", (("norm", "actor/grad_norm", 0, _LINE),), False, False),
    (
        "Learning rate",
        "At the last update of the step.",
        "learning rate",
        (("rate", "actor/lr", 0, _LINE),),
        False,
        False,
    ),
    (
        "Trainer against generation engine",
        "Absolute difference of log-probs of the same tokens.",
        "|Δ log-prob|, nats",
        (
            ("mean", "mismatch/log_prob_diff_mean", 0, _LINE),
            ("max", "mismatch/log_prob_diff_max", 1, _FAINT),
        ),
        True,
        False,
    ),
    (
        "Staleness",
        "Training steps between the weights that sampled a token and those before its update.",
        "versions",
        (
            ("mean of tokens", "staleness/mean", 0, _LINE),
            ("oldest token of a sample, mean", "staleness/sample_max_mean", 1, _LINE),
            ("max", "staleness/max", 1, _FAINT),
        ),
        False,
        False,
    ),
    (
        "Groups without spread",
        "Share of prompts whose responses all have the same score; their advantage is 0.",
        "fraction of groups",
        (("share", "reward/groups_without_spread", 0, _LINE),),
        False,
        False,
    ),
    (
        "Generation speed",
        "Response tokens of the step by the time of generation.",
        "tokens per second",
        (("tokens/s", "rollout/tokens_per_s", 0, _LINE),),
        False,
        False,
    ),
)


def curves_section(run: RunFolder, drawn: ChartCards, distributions: Sequence[Chart] = ()) -> str:
    """Return the cards of reward, distributions, metric families and known metrics."""
    known = []
    for title, note, y_label, rows, log, band in CHARTS:
        series = [Series(label, run.points(name), color, style) for label, name, color, style in rows]
        known.append(Chart(title, note, y_label, tuple(one for one in series if one.points), log, band))
    charts = (_reward_chart(run), *distributions, *family_charts(run), *known, staleness_histogram(run))
    return cards(drawn.card(chart) for chart in charts)


def other_metrics_section(run: RunFolder, drawn: ChartCards) -> str:
    """Return a collapsed card per metric that no other section draws."""
    shown = {name for *_, rows, _, _ in CHARTS for _, name, _, _ in rows} | {*SCORE, *VALIDATION}
    shown |= family_metrics(run)
    others = [name for name in run.metric_names if name not in shown and not name.startswith("time/")]
    charts = [Chart(name, "", name.rpartition("/")[2], (Series("value", run.points(name)),)) for name in others]
    found = [card for chart in charts if (card := drawn.card(chart))]
    return f"<details><summary>{plural(len(found), 'more metric')}</summary>{cards(found)}</details>" if found else ""


def stage_times_section(run: RunFolder, drawn: ChartCards) -> str:
    """Return the stage times of each step as stacked bars. A bar averages neighboring steps of a long run."""
    stages = [name for name in run.metric_names if name.startswith("time/") and name != "time/step"]
    totals = {name: sum(max(value, 0.0) for _, value in run.points(name)) for name in stages}
    whole = sum(totals.values())
    if not whole:
        return ""
    by_time = sorted((name for name in stages if name != "time/other"), key=lambda name: -totals[name])
    large = [name for name in by_time[:_MAX_STAGES] if totals[name] > 0.002 * whole]
    rest = [name for name in stages if name not in large]
    bar_steps = max(1, -(-len(run.rows) // _MAX_BARS))
    starts = range(0, len(run.rows), bar_steps)
    middles = [run.steps[start] + (bar_steps - 1) / 2 if bar_steps > 1 else run.steps[start] for start in starts]

    def layer(label: str, names: Sequence[str], color: int | None) -> Series:
        seconds = [sum(max(row.get(name) or 0.0, 0.0) for name in names) for row in run.rows]
        bars = [seconds[start : start + bar_steps] for start in starts]
        heights = [sum(bar) / len(bar) for bar in bars]
        return Series(label, list(zip(middles, heights, strict=True)), color, span=bar_steps)

    layers = [layer(name.removeprefix("time/"), [name], color) for color, name in enumerate(large)]
    sums = [totals[name] for name in large]
    if total := sum(totals[name] for name in rest):
        layers.append(layer("other", rest, None))
        sums.append(total)
    legend = "".join(
        key(i, one.color, "bar", f"{escape(one.label)} <b>{format_duration(total)}</b> {total / whole:.0%}")
        for i, (one, total) in enumerate(zip(layers, sums, strict=True))
    )
    note = "" if bar_steps == 1 else f"Each bar is the mean of {bar_steps} steps."
    return drawn.card(Chart("Stages of a step", note, "seconds per step", tuple(layers), bars=True), legend)


def staleness_histogram(run: RunFolder) -> Chart:
    """Return the share of tokens with each lag, averaged over the steps; without bars if nothing was stale."""
    shares = {}
    for name in run.metric_names:
        if match := re.fullmatch(r"staleness/share_(\d+)", name):
            shares[int(match[1])] = sum(value for _, value in run.points(name)) / len(run.points("staleness/mean"))
    bars = (Series("share", sorted(shares.items())),) if shares else ()
    note = "Share of the response tokens with each lag, mean over the steps."
    return Chart("Histogram of staleness", note, "fraction of tokens", bars, x_label="lag, versions", bars=True)


def _reward_chart(run: RunFolder) -> Chart:
    series = []
    if reward := run.first_points(SCORE):
        series.append(Series("training", reward))
    if validation := run.first_points(VALIDATION):
        series.append(Series("validation", validation, 1, LineStyle.DOTS))
    return Chart("Reward", "Mean score of the samples of each step.", "mean score", tuple(series), wide=True)
