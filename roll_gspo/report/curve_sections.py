"""The plots of a run's report: reward, known metrics, stage times, all other metrics. Imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from roll_gspo.report.charts import BarLayer, Chart, LineStyle, Series, trailing_mean
from roll_gspo.report.families import family_charts, family_metrics
from roll_gspo.report.html_page import cards, plural
from roll_gspo.report.numbers import format_duration, format_number
from roll_gspo.report.plots import Plotter
from roll_gspo.report.run_folder import SCORE, VALIDATION, RunFolder
from roll_gspo.report.style import series_class

_MIN_WINDOW = 5
_MAX_BARS = 150
_MAX_STAGES = 7
_LINE, _FAINT, _DOTS = LineStyle
_Row = tuple[str, str, int, LineStyle]

# (title, note, ((label, metric, color, style), ...), logarithmic, filled between first and last).
CHARTS: tuple[tuple[str, str, tuple[_Row, ...], bool, bool], ...] = (
    (
        "Supervised loss",
        "Negative log-likelihood of the target tokens, in nats per token.",
        (("step", "sft/loss", 0, _LINE), ("validation", "validation/loss", 1, _DOTS)),
        False,
        False,
    ),
    (
        "Clip fraction",
        "Share whose gradient is clipped; log scale.",
        (("tokens", "actor/clip_fraction", 0, _LINE), ("sequences", "actor/clip_fraction_sequence", 1, _LINE)),
        True,
        False,
    ),
    (
        "Importance ratio",
        "Current policy over old policy: minimum, mean and maximum.",
        (
            ("min", "actor/ratio_min", 0, _FAINT),
            ("mean", "actor/ratio_mean", 0, _LINE),
            ("max", "actor/ratio_max", 0, _FAINT),
        ),
        False,
        True,
    ),
    (
        "KL divergence",
        "To the old policy and to the reference, in nats per token; log scale.",
        (("old policy", "actor/approx_kl", 0, _LINE), ("reference", "actor/kl_ref", 1, _LINE)),
        True,
        False,
    ),
    (
        "Entropy",
        "Entropy of the next-token distribution, in nats.",
        (("entropy", "actor/entropy", 0, _LINE),),
        False,
        False,
    ),
    (
        "Response length",
        "Tokens per response.",
        (("mean", "rollout/response_length_mean", 0, _LINE), ("max", "rollout/response_length_max", 1, _FAINT)),
        False,
        False,
    ),
    ("Gradient norm", "Before clipping.", (("norm", "actor/grad_norm", 0, _LINE),), False, False),
    ("Learning rate", "At the last update of the step.", (("rate", "actor/lr", 0, _LINE),), False, False),
    (
        "Trainer against generation engine",
        "Absolute difference of log-probs of the same tokens, in nats; log scale.",
        (
            ("mean", "mismatch/log_prob_diff_mean", 0, _LINE),
            ("max", "mismatch/log_prob_diff_max", 1, _FAINT),
        ),
        True,
        False,
    ),
    (
        "Groups without spread",
        "Share of prompts whose responses all have the same score; their advantage is 0.",
        (("share", "reward/groups_without_spread", 0, _LINE),),
        False,
        False,
    ),
    (
        "Generation speed",
        "Response tokens per second.",
        (("tokens/s", "rollout/tokens_per_s", 0, _LINE),),
        False,
        False,
    ),
)


def curves_section(run: RunFolder, plotter: Plotter) -> str:
    """Return the cards of reward, metric families and known metrics."""
    known = []
    for title, note, rows, log, band in CHARTS:
        series = [Series(label, run.points(name), color, style) for label, name, color, style in rows]
        known.append(Chart(title, note, tuple(one for one in series if one.points), log, band))
    return cards(chart_card(chart, plotter) for chart in (_reward_chart(run), *family_charts(run), *known))


def other_metrics_section(run: RunFolder, plotter: Plotter) -> str:
    """Return a collapsed card per metric that no other section draws."""
    drawn = {name for _, _, rows, _, _ in CHARTS for _, name, _, _ in rows} | {*SCORE, *VALIDATION}
    drawn |= family_metrics(run)
    others = [name for name in run.metric_names if name not in drawn and not name.startswith("time/")]
    charts = [Chart(name, "", (Series("", run.points(name)),)) for name in others]
    found = [card for chart in charts if (card := chart_card(chart, plotter))]
    return f"<details><summary>{plural(len(found), 'more metric')}</summary>{cards(found)}</details>" if found else ""


def stage_times_section(run: RunFolder, plotter: Plotter) -> str:
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

    def heights(names: Sequence[str]) -> list[float]:
        seconds = [sum(max(row.get(name) or 0.0, 0.0) for name in names) for row in run.rows]
        bars = [seconds[start : start + bar_steps] for start in starts]
        return [sum(bar) / len(bar) for bar in bars]

    layers = [BarLayer(name.removeprefix("time/"), heights([name]), i) for i, name in enumerate(large)]
    sums = [totals[name] for name in large]
    if total := sum(totals[name] for name in rest):
        layers.append(BarLayer("other", heights(rest)))
        sums.append(total)
    legend = "".join(
        f'<span class="key"><i class="{"other" if layer.color is None else series_class(layer.color)} bar"></i>'
        f"{escape(layer.label)} <b>{format_duration(total)}</b> {total / whole:.0%}</span>"
        for layer, total in zip(layers, sums, strict=True)
    )
    note = "Seconds per step." if bar_steps == 1 else f"Seconds per step; each bar is the mean of {bar_steps} steps."
    plot = plotter.stacked_bars("Stage times", [run.steps[start] for start in starts], bar_steps, layers)
    return (
        f'<figure class="card"><figcaption><h3>Stages of a step</h3><p>{note}</p>'
        f'<div class="legend">{legend}</div></figcaption>{plot}</figure>'
    )


def chart_card(chart: Chart, plotter: Plotter) -> str:
    """Return a chart with title, legend and latest values; empty if there is nothing to draw."""
    drawable = chart.drawable
    if not drawable:
        return ""
    legend = "".join(
        f'<span class="key"><i class="{series_class(one.color)} {one.style}"></i>{escape(one.label)} '
        f"<b>{format_number(one.points[-1][1])}</b></span>"
        for one in drawable
    )
    hidden = chart.num_not_positive
    note = f"{chart.note} {plural(hidden, 'value')} of 0 or below not drawn." if hidden else chart.note
    return (
        f'<figure class="card{" wide" if chart.wide else ""}"><figcaption><h3>{escape(chart.title)}</h3>'
        f'<p>{escape(note)}</p><div class="legend">{legend}</div></figcaption>{plotter.lines(chart)}</figure>'
    )


def _reward_chart(run: RunFolder) -> Chart:
    reward, validation = run.first_points(SCORE), run.first_points(VALIDATION)
    series, note = [], "Mean score of the samples of each step."
    if len(reward) >= 2 * _MIN_WINDOW:
        window = max(_MIN_WINDOW, len(reward) // 40)
        series += [
            Series("step", reward, 0, LineStyle.FAINT),
            Series(f"mean of {window} steps", trailing_mean(reward, window)),
        ]
        note = f"Mean score of the samples of each step; bold: mean over the latest {window} steps."
    elif reward:
        series.append(Series("step", reward))
    if validation:
        series.append(Series("validation", validation, 1, LineStyle.DOTS))
    return Chart("Reward", note, tuple(series), wide=True)
