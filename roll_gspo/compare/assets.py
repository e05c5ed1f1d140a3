"""The look of the page: that of a run's report, tables, and a colour for each group."""

# ruff: noqa: E501 (a style sheet reads best with a rule a line)

from __future__ import annotations

from roll_gspo.compare.figures import COLORS, DARK_COLORS
from roll_gspo.report.assets import STYLE as REPORT_STYLE


def _variables(colors: tuple[str, ...]) -> str:
    return "".join(f" --g{i}: {color};" for i, color in enumerate(colors))


_COLORS = f"""
:root {{{_variables(COLORS)} }}
@media (prefers-color-scheme: dark) {{ :root {{{_variables(DARK_COLORS)} }} }}"""
_TABLES = """
.plot { justify-content: flex-start; } .plot figcaption { margin: 4px 4px 6px; }
.plot svg path { fill: inherit; } .plot svg text { font-family: inherit !important; }
.sheet { overflow-x: auto; padding: 4px 14px 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 8px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, .texts th, .texts td { text-align: left; }
thead th { font-weight: 600; vertical-align: bottom; } th small { display: block; font-size: 11.5px; font-weight: 400; color: var(--soft); }
tbody th { font-weight: 600; } tr.seed th, tr.seed td { padding-block: 2px; color: var(--soft); font-weight: 400; }
tr.seed:not(:has(+ tr.seed)) > * { padding-bottom: 9px; } tr.group > * { border-bottom: 0; font-weight: 600; white-space: nowrap; }
tr.seed:has(+ tr.seed) > * { border-bottom: 0; } tr.seed th { padding-left: 29px; } tbody tr:last-child > * { border-bottom: 0; }
th i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px; vertical-align: middle; background: currentColor; }
.texts td { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.texts tbody th { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td.was { background: var(--bad-bg); color: var(--bad); } td.is { background: var(--good-bg); color: var(--good); }
.note { margin: 0 0 12px; max-width: 90ch; color: var(--soft); }
"""
STYLE = REPORT_STYLE + _COLORS + _TABLES
