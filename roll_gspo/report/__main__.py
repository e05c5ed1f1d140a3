"""`python -m roll_gspo.report RUN_FOLDER`: write the report of a run, or show it while the run goes on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from roll_gspo.errors import RollGspoError
from roll_gspo.printable import printable
from roll_gspo.report.page import write_report
from roll_gspo.report.serve import ReportServer


def main() -> int:
    """Write the page and print its path, or serve it, and return the exit status: 2 if the folder holds no run."""
    parser = argparse.ArgumentParser(prog="python -m roll_gspo.report", description=__doc__)
    parser.add_argument("run_folder", type=Path, help="output folder of a run (holds metrics.jsonl)")
    parser.add_argument("--serve", action="store_true", help="serve a page that refreshes itself, on this machine only")
    parser.add_argument("--port", type=int, default=0, help="port of --serve (default: any free port)")
    arguments = parser.parse_args()
    try:
        if arguments.serve:
            return _serve(arguments.run_folder, arguments.port)
        print(printable(str(write_report(arguments.run_folder))))
    except RollGspoError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    return 0


def _serve(folder: Path, port: int) -> int:
    try:
        server = ReportServer(folder, port)
    except OSError as error:
        print(printable(f"--port: {port} cannot be used ({error}); choose another one"), file=sys.stderr)
        return 2
    print(f"{server.url} (refreshes itself; Ctrl-C stops the server, not the run)", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
