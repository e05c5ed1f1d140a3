"""`python -m roll_gspo.report RUN_FOLDER`: write or refresh the report of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from roll_gspo.errors import RollGspoError
from roll_gspo.printable import printable
from roll_gspo.report.page import write_report


def main() -> int:
    """Write the page, print its path and return the exit status: 2 if the folder holds no run."""
    parser = argparse.ArgumentParser(prog="python -m roll_gspo.report", description=__doc__)
    parser.add_argument("run_folder", type=Path, help="output folder of a run (holds metrics.jsonl)")
    try:
        print(write_report(parser.parse_args().run_folder))
    except RollGspoError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
