"""Log one run with one tracker in two sessions: the first fails after step 4, the second resumes at step 3.

    python tracker_sessions.py TRACKER FOLDER

Run it in a separate process: the libraries keep global state. It fails if a Python library opens a connection to
another machine.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from roll_gspo.tracking.base import RunInfo
from roll_gspo.tracking.samples import Sample
from roll_gspo.tracking.trackers import build_trackers

CONFIG = {"exp_name": "numbers", "seed": 7, "rewards": {"math": {"world_size": 2}}, "validation": None}
SAMPLE = Sample(1.0, 0.5, 3, "stop", "math", "2", "2", "1+1=", "2\n|x|<eos>")


def metrics(step: int) -> dict[str, float]:
    return {"reward/score_mean": step / 8, "validation/all/avg@2": 0.5, "actor/grad_norm": float("nan")}


def refuse_connections(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple) and not arguments[1][0].startswith("127."):
        raise ConnectionRefusedError(f"a connection to {arguments[1]}")


def main(name: str, folder: Path) -> None:
    sys.addaudithook(refuse_connections)
    run = RunInfo(folder=folder, name="first", experiment="numbers", tags=("small", "cpu"), config=CONFIG)
    for first_step, last_step in ((1, 4), (3, 5)):
        trackers = build_trackers([name], replace(run, first_step=first_step))
        for step in range(first_step, last_step + 1):
            if step == 2 or step == 4:
                trackers.log_samples(step, [SAMPLE])
            trackers.log(step, metrics(step))
        if last_step == 5:
            report = folder / "report.html"
            report.write_text("<p>the report</p>")
            trackers.finish(report)
        trackers.close()
        time.sleep(1)  # wandb names the folder of a session by the second


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
