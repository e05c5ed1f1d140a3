"""Write report.html: metrics, stage times and samples of a run in one file that needs no network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

from roll_gspo.report.browser import browser_section
from roll_gspo.report.chart_cards import ChartCards, chart_script, controls
from roll_gspo.report.curve_sections import curves_section, other_metrics_section, stage_times_section
from roll_gspo.report.distributions import distribution_charts
from roll_gspo.report.embedded import MAX_VALIDATION_BYTES, embed_samples
from roll_gspo.report.html_page import asset, html_page, plural, warning_list, write_page
from roll_gspo.report.numbers import format_count, format_duration, format_number
from roll_gspo.report.run_folder import SCORE, VALIDATION, Points, RunFolder, read_run
from roll_gspo.report.samples import samples_section
from roll_gspo.report.warnings import run_warnings

_SCRIPTS = ("conversation.js", "browser.js")
_FIRST_AND_LAST = 5
_SHOWN_LAUNCH = ("host", "started", "commit")


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder, atomically, and return its path.

    Reads metrics.jsonl and, if they exist, rollouts/, profile/, config.yaml, plan.txt and run.log. Can be called while
    the run continues.

    Raises:
        DataError: the folder holds no metrics.jsonl.
    """
    return write_page(run_folder / "report.html", render(read_run(run_folder)))


def render(run: RunFolder, version: str | None = None) -> str:
    """Return the page as HTML.

    Args:
        run: contents of the run's folder.
        version: of these contents, for a page that refreshes itself; None for a file.
    """
    drawn = ChartCards()
    samples = embed_samples(run.rollout_files)
    validation = embed_samples(run.validation_files, MAX_VALIDATION_BYTES, ranked=False)
    return html_page(
        run.name,
        _subtitle(run),
        (
            ("", headline(run)),
            ("Warnings", _warnings(run)),
            ("Curves", controls(len(run.rows)) + curves_section(run, drawn, distribution_charts(samples.values))),
            ("Stage times", stage_times_section(run, drawn)),
            ("Samples", browser_section(samples, validation, samples_section(run.rollouts))),
            ("All other metrics", other_metrics_section(run, drawn)),
            ("Profiler traces", _traces(run)),
            ("Plan and configuration", _launches(run) + _texts(run)),
            ("", drawn.data()),
        ),
        style=asset("charts.css") + asset("browser.css"),
        script="".join((chart_script(), *map(asset, _SCRIPTS), "" if version is None else asset("live.js"))),
        version=version,
    )


def _subtitle(run: RunFolder) -> str:
    steps = run.steps
    span = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else plural(len(steps), "step")
    facts = [str(run.launches[-1][key]) for key in _SHOWN_LAUNCH if run.launches and run.launches[-1].get(key)]
    return " · ".join([span if steps else "no step yet", *facts])


def _launches(run: RunFolder) -> str:
    """Return a line per process of the run: its date, host, commit and command."""
    lines = ["  ".join(f"{key}: {value}" for key, value in launch.items()) for launch in run.launches]
    return _collapsed(f"Processes of this run ({len(lines)})", "\n".join(lines)) if lines else ""


def headline(run: RunFolder) -> str:
    """Return tiles with the most important values: reward, validation, time and tokens."""
    reward, validation = run.first_points(SCORE), run.first_points(VALIDATION)
    tiles = []
    if reward:
        first, last = _mean(reward[:_FIRST_AND_LAST]), _mean(reward[-_FIRST_AND_LAST:])
        window = plural(min(_FIRST_AND_LAST, len(reward)), "step")
        tiles.append((f"Reward, first and last {window}", _change(first, last), f"{last - first:+.3f}"))
        tiles.append(("Best reward", *_best(reward)))
    if validation:
        best, step = _best(validation)
        change = _change(validation[0][1], validation[-1][1])
        tiles.append(("Validation, first and last", change, f"best {best} {step}"))
    if times := run.points("time/step"):
        total = sum(seconds for _, seconds in times)
        tiles.append(("Time", format_duration(total), f"{format_number(total / len(times))} s per step"))
    if tokens := run.points("rollout/num_tokens"):
        speeds = run.points("rollout/tokens_per_s")
        speed = f"{format_number(_mean(speeds))} per second" if speeds else ""
        tiles.append(("Response tokens", format_count(sum(count for _, count in tokens)), speed))
    if not tiles:
        return "<p>No step has been logged yet.</p>"
    drawn = (
        f'<div class="tile"><h3>{name}</h3><p>{value}</p><small>{detail}</small></div>' for name, value, detail in tiles
    )
    return f'<div class="tiles">{"".join(drawn)}</div>'


def _change(first: float, last: float) -> str:
    return f"{format_number(first)} <small>→</small> {format_number(last)}"


def _best(points: Points) -> tuple[str, str]:
    step, value = max(points, key=lambda point: point[1])
    return format_number(value), f"at step {step}"


def _mean(points: Points) -> float:
    return sum(value for _, value in points) / len(points)


def _warnings(run: RunFolder) -> str:
    if not run.log_warnings:
        return warning_list(run_warnings(run))
    summary = f"Latest warnings and errors of run.log ({len(run.log_warnings)})"
    return warning_list(run_warnings(run)) + _collapsed(summary, "\n".join(run.log_warnings))


def _traces(run: RunFolder) -> str:
    """Return links to the profiler traces, relative to the run's folder; empty if there are none."""
    if not run.traces:
        return ""
    links = "".join(f'<li><a href="{quote(path)}">{escape(path)}</a></li>' for path in run.traces)
    return (
        f"<details><summary>{plural(len(run.traces), 'trace')}</summary><p>Open a trace in https://ui.perfetto.dev or "
        f"chrome://tracing.</p><ul>{links}</ul></details>"
    )


def _texts(run: RunFolder) -> str:
    return "".join(_collapsed(name, text) for name, text in (("Plan", run.plan), ("Configuration", run.config)) if text)


def _collapsed(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary><pre>{escape(text)}</pre></details>"
