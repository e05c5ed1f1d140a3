"""report.html: the whole run on one page that needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from roll_gspo.report.assets import PAGE, SCRIPT, STYLE
from roll_gspo.report.browser import BROWSER_SCRIPT, BROWSER_STYLE, browser_section
from roll_gspo.report.curves import Chart, Series, chart_card, figure, stacked_bars, trailing_mean
from roll_gspo.report.embedded import embedded
from roll_gspo.report.families import family_charts, family_names
from roll_gspo.report.run_folder import Points, RunFolder, read_run
from roll_gspo.report.samples import rollouts_section

_ENDS = 5
_MAX_BARS = 150
_MAX_STAGES = 7

# (title, note, ((label, metric, color, style), ...), logarithmic, filled between first and last).
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str, int, str], ...], bool, bool], ...] = (
    (
        "Supervised loss",
        "Negative log-likelihood of the tokens to imitate; nats a token.",
        (("step", "sft/loss", 1, "line"), ("validation", "validation/loss", 2, "dots")),
        False,
        False,
    ),
    (
        "Clip fraction",
        "Share whose gradient the clip takes away; logarithmic.",
        (
            ("tokens", "actor/clip_fraction", 1, "line"),
            ("sequences", "actor/clip_fraction_sequence", 2, "line"),
        ),
        True,
        False,
    ),
    (
        "Importance ratio",
        "Current to old policy: smallest, mean, largest.",
        (
            ("min", "actor/ratio_min", 1, "faint"),
            ("mean", "actor/ratio_mean", 1, "line"),
            ("max", "actor/ratio_max", 1, "faint"),
        ),
        False,
        True,
    ),
    (
        "KL",
        "To the old policy and to the reference; nats a token, logarithmic.",
        (("old policy", "actor/approx_kl", 1, "line"), ("reference", "actor/kl_ref", 2, "line")),
        True,
        False,
    ),
    (
        "Entropy",
        "Of the next-token distribution; nats.",
        (("entropy", "actor/entropy", 1, "line"),),
        False,
        False,
    ),
    (
        "Response length",
        "Tokens.",
        (
            ("mean", "rollout/response_length_mean", 1, "line"),
            ("max", "rollout/response_length_max", 2, "faint"),
        ),
        False,
        False,
    ),
    (
        "Gradient norm",
        "Before clipping.",
        (("norm", "actor/grad_norm", 1, "line"),),
        False,
        False,
    ),
    ("Learning rate", "Of the last update.", (("rate", "actor/lr", 1, "line"),), False, False),
    (
        "Training against inference",
        "|Δ log-probability| of the two engines on the same tokens; nats, logarithmic.",
        (
            ("mean", "mismatch/log_prob_diff_mean", 1, "line"),
            ("max", "mismatch/log_prob_diff_max", 2, "faint"),
        ),
        True,
        False,
    ),
    (
        "Groups without spread",
        "Share of prompts whose responses all score the same: they teach nothing.",
        (("share", "reward/groups_without_spread", 1, "line"),),
        False,
        False,
    ),
    (
        "Generation speed",
        "Response tokens a second.",
        (("tokens/s", "rollout/tokens_per_s", 1, "line"),),
        False,
        False,
    ),
)

# of every sample; else of those that were trained on
_REWARDS = ("rollout/score_mean", "reward/score_mean")
_VALIDATION = "validation/score_mean"


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder, atomically, and return its path.

    Reads metrics.jsonl, and where they are there rollouts/, config.yaml, plan.txt and run.log. Can be
    called while the run goes on.

    Raises:
        DataError: the folder holds no metrics.jsonl.
    """
    page = render(read_run(run_folder))
    path = run_folder / "report.html"
    temporary = run_folder / f".report.html.{os.getpid()}.tmp"
    temporary.write_text(page, encoding="utf-8", errors="replace")  # data may hold half a character
    temporary.replace(path)
    return path


def render(run: RunFolder) -> str:
    """The page as HTML."""
    steps = run.steps
    span = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{len(steps)} step"
    sections = (
        ("", headline(run)),
        ("Attention", _attention(run)),
        ("Curves", _curves(run)),
        ("Where the time goes", _times(run)),
        ("Rollouts", browser_section(embedded(run.rollout_files), rollouts_section(run.rollouts))),
        ("All other metrics", _other_curves(run)),
        ("Plan and configuration", _texts(run)),
    )
    body = "".join(
        f"<section>{f'<h2>{title}</h2>' if title else ''}{content}</section>" for title, content in sections if content
    )
    return PAGE.format(
        title=escape(run.name),
        subtitle=span if steps else "no step yet",
        body=body,
        style=STYLE + BROWSER_STYLE,
        script=SCRIPT + BROWSER_SCRIPT,
    )


def headline(run: RunFolder) -> str:
    """The figures that one looks for first."""
    reward, validation = _rewards(run), run.points(_VALIDATION)
    tiles = []
    if reward:
        first, last = _mean(reward[:_ENDS]), _mean(reward[-_ENDS:])
        best = max(reward, key=lambda p: p[1])
        count = min(_ENDS, len(reward))
        ends = f"{figure(first)} <small>→</small> {figure(last)}"
        tiles.append((f"Mean reward, first and last {count} step{'s' * (count > 1)}", ends, f"{last - first:+.3f}"))
        tiles.append(("Best step", figure(best[1]), f"step {best[0]}"))
    if validation:
        best = max(validation, key=lambda p: p[1])
        ends = f"{figure(validation[0][1])} <small>→</small> {figure(validation[-1][1])}"
        tiles.append(("Validation, first and last", ends, f"best {figure(best[1])} at step {best[0]}"))
    times, tokens = run.points("time/step"), run.points("rollout/num_tokens")
    if times:
        total = sum(v for _, v in times)
        tiles.append(("Time", _duration(total), f"{figure(total / len(times))} s a step"))
    if tokens:
        speeds = [v for _, v in run.points("rollout/tokens_per_s")]
        speed = f"{figure(sum(speeds) / len(speeds))} a second" if speeds else ""
        tiles.append(("Response tokens", _large(sum(v for _, v in tokens)), speed))
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><h3>{name}</h3><p>{value}</p><small>{detail}</small></div>'
            for name, value, detail in tiles
        )
        + "</div>"
        if tiles
        else "<p>No step has been logged yet.</p>"
    )


def _attention(run: RunFolder) -> str:
    """Skipped updates, failed rewards, figures that were not finite, warnings; empty where all went well."""
    items = []
    for name, what in (
        ("actor/skipped_updates", "Optimizer steps skipped"),
        ("reward/failed", "Rewards that could not be computed"),
    ):
        hit = [(step, value) for step, value in run.points(name) if value]
        if hit:
            items.append(f"{what}: {figure(sum(v for _, v in hit))} (step {_some([s for s, _ in hit])})")
    items += [f"{name} was not finite: step {_some(steps)}" for name, steps in run.not_finite().items()]
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    log = ""
    if run.warnings:
        lines = escape("\n".join(run.warnings))
        summary = f"Warnings and errors in run.log ({len(run.warnings)})"
        log = f"<details><summary>{summary}</summary><pre>{lines}</pre></details>"
    return f'<ul class="attention">{listed}</ul>{log}' if listed else log


def _curves(run: RunFolder) -> str:
    cards = [chart_card(_reward_chart(run))]
    for title, note, lines, log, band in CHARTS:
        found = [Series(label, run.points(name), color, style) for label, name, color, style in lines]
        cards.append(chart_card(Chart(title, note, tuple(s for s in found if s.points), log, band)))
    cards[1:1] = [chart_card(chart) for chart in family_charts(run)]
    return f'<div class="cards">{"".join(cards)}</div>' if any(cards) else ""


def _rewards(run: RunFolder) -> Points:
    """Mean score of every sample of each step."""
    return next((points for name in _REWARDS if (points := run.points(name))), [])


def _reward_chart(run: RunFolder) -> Chart:
    reward, validation = _rewards(run), run.points(_VALIDATION)
    series, note = [], "Mean score of the step's samples."
    if len(reward) >= 2 * _ENDS:
        window = max(_ENDS, len(reward) // 40)
        series += [
            Series("step", reward, 1, "faint"),
            Series(f"mean of {window}", trailing_mean(reward, window), 1),
        ]
        note = f"Mean score of the step's samples; bold: of the latest {window} steps."
    elif reward:
        series.append(Series("step", reward, 1))
    if validation:
        series.append(Series("validation", validation, 2, "dots"))
    return Chart("Reward", note, tuple(series), wide=True)


def _other_curves(run: RunFolder) -> str:
    shown = {name for _, _, lines, _, _ in CHARTS for _, name, _, _ in lines} | {*_REWARDS, _VALIDATION}
    shown |= family_names(run)
    names = [n for n in run.names() if n not in shown and not n.startswith("time/")]
    cards = [chart_card(Chart(n, "", (Series("", run.points(n), 1),))) for n in names if run.points(n)]
    if not cards:
        return ""
    drawn = f'<div class="cards">{"".join(cards)}</div>'
    return f"<details><summary>{len(cards)} more curves</summary>{drawn}</details>"


def _times(run: RunFolder) -> str:
    """Share of each stage over the run, and the stages of each step (neighbours averaged in long runs)."""
    stages = [n for n in run.names() if n.startswith("time/") and n != "time/step"]
    rows = _buckets([{n: max(row.get(n) or 0.0, 0.0) for n in stages} | {"step": row["step"]} for row in run.rows])
    totals = {n: sum(max(v, 0.0) for _, v in run.points(n)) for n in stages}
    whole = sum(totals.values())
    if not whole:
        return ""
    ordered = sorted((n for n in stages if n != "time/other"), key=lambda n: -totals[n])
    large = [n for n in ordered[:_MAX_STAGES] if totals[n] > 0.002 * whole]
    rest = [n for n in stages if n not in large]
    layers = [(n.removeprefix("time/"), i + 1, [r[n] for r in rows]) for i, n in enumerate(large)]
    if sum(totals[n] for n in rest):
        layers.append(("other", 0, [sum(r[n] for n in rest) for r in rows]))
    sums = [totals[n] for n in large] + [sum(totals[n] for n in rest)]
    legend = "".join(
        f'<span class="key"><i class="c{color} bar"></i>{escape(label)} <b>{_duration(total)}</b> '
        f"{total / whole:.0%}</span>"
        for (label, color, _), total in zip(layers, sums, strict=False)
    )
    per = len(run.rows) / len(rows)
    note = "Seconds of each step." if per == 1 else f"Seconds a step; each bar is the mean of about {per:.0f} steps."
    bars = stacked_bars([int(r["step"]) for r in rows], layers)
    return (
        f'<figure class="card"><figcaption><h3>Stages of a step</h3><p>{note}</p>'
        f'<div class="legend">{legend}</div></figcaption>{bars}</figure>'
    )


def _buckets(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """At most `_MAX_BARS` rows, each the mean of neighbours under the step of the first."""
    size = max(1, -(-len(rows) // _MAX_BARS))
    merged = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        merged.append({n: sum(r[n] for r in part) / len(part) for n in part[0]} | {"step": part[0]["step"]})
    return merged


def _texts(run: RunFolder) -> str:
    parts = (("Plan", run.plan), ("Configuration", run.config))
    return "".join(f"<details><summary>{n}</summary><pre>{escape(t)}</pre></details>" for n, t in parts if t)


def _mean(points: Points) -> float:
    return sum(value for _, value in points) / len(points)


def _some(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:12])) + (f" and {len(steps) - 12} more" if len(steps) > 12 else "")


def _large(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
