"""compare.html and its figures: runs on the same axes, on one page that needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from roll_gspo.compare.assets import STYLE
from roll_gspo.compare.caveats import remarks
from roll_gspo.compare.differences import Difference, differences, num_equal
from roll_gspo.compare.drawings import Drawing, drawings
from roll_gspo.compare.figures import COLORS, figure_of, inline, overview_of, write_files
from roll_gspo.compare.panels import LEARNING, OTHERS, UPDATES
from roll_gspo.compare.runs import Group, Run, find_runs, group_runs, load_run
from roll_gspo.compare.spread import resolution
from roll_gspo.compare.summary import Column, columns
from roll_gspo.errors import DataError
from roll_gspo.report.assets import PAGE

_MAX_TITLE = 60
_FIGURES = "figures"


@dataclass(frozen=True)
class Comparison:
    """What was written.

    Attributes:
        page: compare.html.
        figures: folder of the PNG and SVG files.
        groups: in the order of the page.
        table: final values.
    """

    page: Path
    figures: Path
    groups: list[Group]
    table: list[Column]


def write_comparison(paths: Sequence[Path], out: Path | None = None) -> Comparison:
    """Write the page and the figures, and return where they are and the final values.

    Args:
        paths: folders of runs, or folders that contain runs.
        out: made if missing; by default `compare` in the folder that contains all of the runs.

    Raises:
        DataError: there is no run, none has logged a step, or one has no readable config.yaml.
    """
    folders = find_runs(paths)
    loaded = [load_run(folder) for folder in folders]
    runs = [run for run in loaded if run.record.rows]
    if not runs:
        raise DataError(f"{folders[0]}: no step has been logged yet, nor in any other run; wait for the first one")
    groups = group_runs(runs)
    seen = resolution(runs)
    sections = [
        ("Reward and held-out accuracy", drawings(groups, LEARNING, seen)),
        ("What the updates do", drawings(groups, UPDATES, seen)),
        ("More", [one for one in drawings(groups, OTHERS, seen) if not one.is_constant]),
    ]
    table = columns(groups)
    empty = [run for run in loaded if not run.record.rows]
    out = out or common_folder(folders) / "compare"
    figures = out / _FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    page = _render(groups, table, remarks(groups, empty), sections, figures)
    temporary = out / f".compare.html.{os.getpid()}.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out / "compare.html")
    return Comparison(out / "compare.html", figures, groups, table)


def common_folder(folders: Sequence[Path]) -> Path:
    """The innermost folder that contains all of the runs' folders; relative where it lies below the current one."""
    common = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    return common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common


def _render(
    groups: Sequence[Group],
    table: Sequence[Column],
    attention: Sequence[str],
    sections: Sequence[tuple[str, Sequence[Drawing]]],
    figures: Path,
) -> str:
    """The page; writes the figures on the way, each of which is drawn once for both."""
    main = [drawing for title, shown in sections if title != "More" for drawing in shown]
    if main:
        write_files(overview_of(main), figures, "overview")
    parts = [("Final values", _final_values(groups, table)), ("Attention", _attention(attention))]
    parts += [(title, _cards(shown, figures)) for title, shown in sections]
    parts += [("What differs in the configurations", _configurations(groups)), ("Runs", _runs(groups))]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in parts if content)
    num_runs, last = sum(len(group.runs) for group in groups), max(r.last_step for g in groups for r in g.runs)
    title = " · ".join(group.label for group in groups)
    return PAGE.format(
        title=escape(title if len(title) <= _MAX_TITLE else f"{len(groups)} configurations"),
        subtitle=f"{num_runs} run{'s' * (num_runs > 1)}, {last} step{'s' * (last > 1)}",
        body=body,
        style=STYLE,
        script="",
    )


def _final_values(groups: Sequence[Group], table: Sequence[Column]) -> str:
    heads = "".join(
        f"<th scope=col>{escape(column.quantity.title)}<small>{column.quantity.over}</small></th>" for column in table
    )
    rows = []
    for number, group in enumerate(groups):
        many = len(group.runs) > 1
        what = group.num_runs if many else f"seed {group.runs[0].seed}"
        cells = "".join(f"<td>{column.of_group(number)}</td>" for column in table)
        rows.append(f"<tr class=group>{_name(groups, number, what)}{cells}</tr>")
        if many:
            for i, run in enumerate(group.runs):
                cells = "".join(f"<td>{column.of_run(number, i)}</td>" for column in table)
                rows.append(f"<tr class=seed><th scope=row>seed {escape(run.seed)}</th>{cells}</tr>")
    several = any(len(group.runs) > 1 for group in groups)
    note = '<p class="note">Mean ± standard deviation over the runs of a configuration.</p>' if several else ""
    return note + _sheet(f"<th>Runs</th>{heads}", "".join(rows))


def _attention(found: Sequence[str]) -> str:
    return f'<ul class="attention">{"".join(f"<li>{escape(one)}</li>" for one in found)}</ul>' if found else ""


def _cards(shown: Sequence[Drawing], figures: Path) -> str:
    cards = []
    for drawing in shown:
        panel = drawing.panel
        source = write_files(figure_of(drawing), figures, panel.name)
        note = panel.note
        if hidden := drawing.num_not_positive:
            note += f" {hidden} value{'s' * (hidden > 1)} of 0 lie at the lower edge."
        caption = f"<figcaption><p>{escape(note.strip())}</p></figcaption>" if note else ""
        cards.append(f'<figure class="card plot">{inline(source, drawing.description)}{caption}</figure>')
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _configurations(groups: Sequence[Group]) -> str:
    configs = [group.runs[0].config for group in groups]
    if len(groups) == 1:
        return '<p class="note">There is one configuration: the runs differ in their seed, names and folders only.</p>'
    same = num_equal(configs)
    note = (
        f"From each run's config.yaml; {same} other values are the same everywhere. Seed, names and folders are left "
        f"out. Marked: what is not as in {groups[0].label}."
    )
    heads = "".join(_name(groups, number, "", "col") for number in range(len(groups)))
    rows = "".join(_difference(row) for row in differences(configs))
    return f'<p class="note">{escape(note)}</p>' + _sheet(f"<th>Key</th>{heads}", rows, " texts")


def _difference(row: Difference) -> str:
    cells = [
        f"<td{tone}>{escape(value)}</td>"
        for i, value in enumerate(row.values)
        for tone in [" class=was" if not i else " class=is" if value != row.values[0] else ""]
    ]
    return f"<tr><th scope=row>{escape(row.key)}</th>{''.join(cells)}</tr>"


def _runs(groups: Sequence[Group]) -> str:
    rows = "".join(
        f"<tr>{_name(groups, number, '')}<td>{escape(run.seed)}</td><td>{_steps(run)}</td>"
        f"<td>{escape(str(run.folder))}</td></tr>"
        for number, group in enumerate(groups)
        for run in group.runs
    )
    return _sheet("<th>Configuration</th><th>Seed</th><th>Steps</th><th>Folder</th>", rows, " texts")


def _steps(run: Run) -> str:
    short = run.max_steps is not None and run.last_step < run.max_steps
    return f"{run.last_step} of {run.max_steps}" if short else f"{run.last_step}"


def _name(groups: Sequence[Group], number: int, detail: str, scope: str = "row") -> str:
    """A group's label with its colour, as a head of a row or column."""
    small = f"<small>{escape(detail)}</small>" if detail else ""
    color = f'<i style="color: var(--g{number % len(COLORS)})"></i>'
    return f"<th scope={scope}>{color}{escape(groups[number].label)}{small}</th>"


def _sheet(head: str, rows: str, kind: str = "") -> str:
    return f'<div class="card sheet{kind}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
