"""Write compare.html: runs on the same axes, final values and configuration differences, in one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from roll_gspo.compare.caveats import find_caveats
from roll_gspo.compare.curves import PanelCurves, panel_chart, panel_curves
from roll_gspo.compare.differences import Difference, count_equal, differences
from roll_gspo.compare.panels import LEARNING, OTHERS, UPDATES, other_panels
from roll_gspo.compare.plots import save_overview, save_panel
from roll_gspo.compare.runs import Group, Run, find_runs, group_runs, load_run
from roll_gspo.compare.seed_spread import choose_smoothing
from roll_gspo.compare.summary import SummaryColumn, summary_columns
from roll_gspo.errors import DataError
from roll_gspo.report.chart_cards import ChartCards, chart_script, controls
from roll_gspo.report.html_page import asset, cards, html_page, plural, warning_list, write_page
from roll_gspo.report.style import series_class

_MAX_TITLE = 60


@dataclass(frozen=True)
class Comparison:
    """The files of a comparison, and its contents.

    Attributes:
        page: compare.html.
        plots: folder of the PNG and SVG files.
        groups: in the order of the page.
        table: final values.
    """

    page: Path
    plots: Path
    groups: list[Group]
    table: list[SummaryColumn]


def write_comparison(paths: Sequence[Path], out: Path | None = None) -> Comparison:
    """Write the page and the plots.

    Args:
        paths: folders of runs, or folders that contain runs.
        out: created if missing; by default `compare` in the folder that contains all runs.

    Raises:
        DataError: there is no run, no run has logged a step, or a run has no readable config.yaml.
    """
    folders = find_runs(paths)
    loaded = [load_run(folder) for folder in folders]
    runs = [run for run in loaded if run.record.rows]
    if not runs:
        raise DataError(f"{folders[0]}: no step has been logged yet, nor in any other run; wait for the first step")
    groups = group_runs(runs)
    out = out or common_folder(folders) / "compare"
    plots = out / "figures"
    plots.mkdir(parents=True, exist_ok=True)
    table = summary_columns(groups)
    caveats = find_caveats(groups, [run for run in loaded if not run.record.rows])
    drawn = ChartCards()
    sections = [
        ("Final values", _final_values(groups, table)),
        ("Caveats", warning_list(caveats)),
        *_plot_sections(groups, plots, drawn),
        ("Configuration differences", _configurations(groups)),
        ("Runs", _runs(groups, out)),
        ("", drawn.data()),
    ]
    last = max(run.last_step for run in runs)
    title = " · ".join(group.label for group in groups)
    page = html_page(
        title if len(title) <= _MAX_TITLE else f"{len(groups)} configurations",
        f"{plural(len(runs), 'run')}, {plural(last, 'step')}",
        sections,
        asset("charts.css"),
        chart_script(),
    )
    return Comparison(write_page(out / "compare.html", page), plots, groups, table)


def common_folder(folders: Sequence[Path]) -> Path:
    """Return the innermost folder that contains all runs' folders; relative if it is below the current one."""
    common = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    return common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common


def _plot_sections(groups: Sequence[Group], folder: Path, drawn: ChartCards) -> list[tuple[str, str]]:
    """Write the plots of the known panels as files, and return the sections with the charts of all metrics."""
    smoothing = choose_smoothing([run for group in groups for run in group.runs])
    learning, updates, others = (panel_curves(groups, panels, smoothing) for panels in (LEARNING, UPDATES, OTHERS))
    others = [one for one in others if not one.is_constant]
    for panel in (*learning, *updates, *others):
        save_panel(panel, folder)
    if learning or updates:
        save_overview([*learning, *updates], folder)
    known = {name for panel in (*LEARNING, *UPDATES, *OTHERS) for name in panel.metrics}
    names = {name for group in groups for run in group.runs for name in run.record.metric_names}
    rest = panel_curves(groups, other_panels(sorted(names - known)), smoothing)
    found = "".join(_card(one, drawn) for one in rest)
    more = f"<details><summary>{plural(len(rest), 'more metric')}</summary>{cards([found])}</details>" if rest else ""
    return [
        ("Reward and held-out accuracy", controls(0) + cards(_card(one, drawn) for one in learning)),
        ("Policy updates", cards(_card(one, drawn) for one in updates)),
        ("Other metrics", cards(_card(one, drawn) for one in others) + more),
    ]


def _card(shown: PanelCurves, drawn: ChartCards) -> str:
    return drawn.card(panel_chart(shown), description=shown.description)


def _final_values(groups: Sequence[Group], table: Sequence[SummaryColumn]) -> str:
    heads = "".join(
        f"<th scope=col>{escape(column.metric.title)}<small>{column.metric.reduction}</small></th>" for column in table
    )
    rows = []
    for i, group in enumerate(groups):
        has_seeds = len(group.runs) > 1
        detail = group.num_runs if has_seeds else f"seed {group.runs[0].seed}"
        cells = "".join(f"<td>{column.group_text(i)}</td>" for column in table)
        rows.append(f"<tr class=group>{_group_head(groups, i, detail)}{cells}</tr>")
        for j, run in enumerate(group.runs if has_seeds else ()):
            cells = "".join(f"<td>{column.run_text(i, j)}</td>" for column in table)
            rows.append(f"<tr class=seed><th scope=row>seed {escape(run.seed)}</th>{cells}</tr>")
    has_spread = any(len(group.runs) > 1 for group in groups)
    note = '<p class="note">Mean ± standard deviation over the runs of a configuration.</p>' if has_spread else ""
    return note + _table(f"<th>Runs</th>{heads}", "".join(rows))


def _configurations(groups: Sequence[Group]) -> str:
    configs = [group.runs[0].config for group in groups]
    if len(groups) == 1:
        return '<p class="note">All runs have the same configuration except for seed, names and folders.</p>'
    note = (
        f"From config.yaml of each run, without seed, names and folders. {count_equal(configs):,} other values are the "
        f"same in all runs. Colored cells differ from {groups[0].label}."
    )
    heads = "".join(_group_head(groups, i, "", "col") for i in range(len(groups)))
    rows = "".join(_difference(row) for row in differences(configs))
    return f'<p class="note">{escape(note)}</p>' + _table(f"<th>Key</th>{heads}", rows, " texts")


def _difference(row: Difference) -> str:
    cells = [
        f"<td{css}>{escape(value)}</td>"
        for i, value in enumerate(row.values)
        for css in [" class=was" if not i else " class=is" if value != row.values[0] else ""]
    ]
    return f"<tr><th scope=row>{escape(row.key)}</th>{''.join(cells)}</tr>"


def _runs(groups: Sequence[Group], out: Path) -> str:
    rows = "".join(
        f"<tr>{_group_head(groups, i, '')}<td>{_report_link(run, out)}</td><td>{escape(run.seed)}</td>"
        f"<td>{_steps(run)}</td><td>{escape(run.commit or 'unknown')}</td><td>{escape(str(run.folder))}</td></tr>"
        for i, group in enumerate(groups)
        for run in group.runs
    )
    heads = ("Configuration", "Run and its report", "Seed", "Steps", "Commit", "Folder")
    return _table("".join(f"<th>{head}</th>" for head in heads), rows, " texts")


def _report_link(run: Run, out: Path) -> str:
    """Return the name of the run as a link to its report, if there is one."""
    report = run.folder / "report.html"
    if not report.is_file():
        return escape(run.name)
    return f'<a href="{quote(os.path.relpath(report.resolve(), out.resolve()))}">{escape(run.name)}</a>'


def _steps(run: Run) -> str:
    return f"{run.last_step} of {run.max_steps}" if run.is_short else f"{run.last_step}"


def _group_head(groups: Sequence[Group], index: int, detail: str, scope: str = "row") -> str:
    """Return a row or column header with the label and color of a group."""
    small = f"<small>{escape(detail)}</small>" if detail else ""
    color = f'<i class="{series_class(index)}"></i>'
    return f"<th scope={scope}>{color}{escape(groups[index].label)}{small}</th>"


def _table(head: str, rows: str, css: str = "") -> str:
    return f'<div class="card sheet{css}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
