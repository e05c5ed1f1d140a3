"""`python -m roll_gspo.compare FOLDER ...`: several runs on the same axes, seeds as mean and spread.

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

_WIDTH_OF_PIPES = 160


def main() -> int:
    """Write page and figures, print the final values and where the files are; 2 where there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m roll_gspo.compare", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of a run, or containing runs")
    parser.add_argument("--out", type=Path, help="where to write; default: compare/ in the folder that contains all")
    arguments = parser.parse_args()
    try:
        written = write_comparison(arguments.folders, arguments.out)
    except RollGspoError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error}; --out FOLDER writes elsewhere", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_PIPES)
    console.print(final_values(written))
    print(f"{written.page}; each figure as PNG and SVG in {written.figures}{os.sep}")
    return 0


def final_values(written: Comparison) -> Table:
    """A row for each quantity, a column for each group; below mean ± standard deviation the seeds one by one."""
    table = Table(title="Final values: mean ± standard deviation, below it each seed", title_justify="left")
    table.add_column("", no_wrap=True)
    for group in written.groups:
        seeds = ", ".join(run.seed for run in group.runs)
        table.add_column(f"{escape(group.label)}\n[dim]seed {escape(seeds)}[/dim]", justify="right")
    for column in written.table:
        cells = []
        for number, group in enumerate(written.groups):
            runs = " ".join(column.of_run(number, i) for i in range(len(group.runs)))
            cells.append(column.of_group(number) + (f"\n[dim]{runs}[/dim]" if len(group.runs) > 1 else ""))
        table.add_row(f"{column.quantity.title}\n[dim]{column.quantity.over}[/dim]", *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
