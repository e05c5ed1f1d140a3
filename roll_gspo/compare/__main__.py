"""`python -m roll_gspo.compare FOLDER ...`: plot runs on the same axes, with mean and range over seeds.

Each FOLDER is the output folder of a run or contains such folders. Runs that differ in `seed` only become one curve.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from roll_gspo.compare.page import Comparison, write_comparison
from roll_gspo.errors import RollGspoError
from roll_gspo.printable import printable

_PIPE_WIDTH = 160


def main() -> int:
    """Write page and plots, print the final values and the paths, and return the exit status: 2 on an error."""
    parser = argparse.ArgumentParser(prog="python -m roll_gspo.compare", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="output folder of a run, or of runs")
    parser.add_argument("--out", type=Path, help="default: compare/ in the folder that contains all runs")
    arguments = parser.parse_args()
    try:
        written = write_comparison(arguments.folders, arguments.out)
    except RollGspoError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    except OSError as error:
        print(printable(f"{error}; --out FOLDER writes elsewhere"), file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    console.print(final_values(written))
    print(f"{written.page}; PNG and SVG of each plot in {written.plots}{os.sep}")
    return 0


def final_values(written: Comparison) -> Table:
    """Return a table with a row per metric and a column per group: mean ± standard deviation, and each seed."""
    table = Table(title="Final values: mean ± standard deviation, and each seed", title_justify="left")
    table.add_column("", no_wrap=True)
    for group in written.groups:
        seeds = ", ".join(run.seed for run in group.runs)
        table.add_column(f"{escape(group.label)}\n[dim]seed {escape(seeds)}[/dim]", justify="right")
    for column in written.table:
        cells = []
        for i, group in enumerate(written.groups):
            seeds = " ".join(column.run_text(i, j) for j in range(len(group.runs)))
            cells.append(column.group_text(i) + (f"\n[dim]{seeds}[/dim]" if len(group.runs) > 1 else ""))
        table.add_row(f"{column.metric.title}\n[dim]{column.metric.reduction}[/dim]", *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
