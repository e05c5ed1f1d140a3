"""Time to write report.html after a save, for a short and a long run.

    python benchmarks/report.py [--steps 80 2000] [--rounds 5]

Each run logs every known metric and writes the samples of every step. The runs take turns in every round, after a first
one that warms up. The table shows the median time, the size of the page, and the median of the
rounds' quotients against the shortest run: it must stay below the quotient of the steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from roll_gspo.report.page import write_report
from roll_gspo.rollout_files import SCHEMA, StepFile, step_path
from roll_gspo.tracking.names import METRICS

STAGES = ("generate", "reward", "old_log_probs", "reference", "update", "sync", "other")
SAMPLES_PER_STEP, TOKENS_PER_SAMPLE = 16, 30


def write_run(folder: Path, num_steps: int) -> None:
    """Write a run's folder: noisy metrics, and 16 samples per step."""
    noise = random.Random(0)
    (folder / "rollouts").mkdir(parents=True)
    names = [name for name in METRICS if not name.startswith("time/") and "*" not in name and "{" not in name]
    tokens = ["42 "] * TOKENS_PER_SAMPLE
    with (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(1, num_steps + 1):
            row = {name: step / num_steps + 0.2 * noise.random() for name in names}
            row |= {f"time/{stage}": 0.1 + noise.random() for stage in STAGES}
            row |= {"actor/skipped_updates": 0.0, "reward/failed": 0.0}
            row["time/step"] = sum(value for name, value in row.items() if name.startswith("time/"))
            metrics.write(json.dumps({"step": step, **row}) + "\n")
            samples = [
                {
                    "sample": i,
                    "prompt": "What is 6 * 7?",
                    "response": "".join(tokens),
                    "score": noise.random(),
                    "group": i // 4,
                    "response_length": len(tokens),
                    "response_tokens": tokens,
                    "rollout_log_probs": [-noise.random() for _ in tokens],
                    "old_log_probs": [-noise.random() for _ in tokens],
                    "advantages": [0.5] * len(tokens),
                }
                for i in range(SAMPLES_PER_STEP)
            ]
            file = StepFile(step_path(folder / "rollouts", step))
            file.add(pa.RecordBatch.from_pylist(samples, schema=SCHEMA))
            file.complete()


def seconds_of(folder: Path) -> float:
    """Write the report once and return the time."""
    start = time.perf_counter()
    write_report(folder)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[80, 2000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folders = {steps: Path(directory) / f"{steps}" for steps in sorted(arguments.steps)}
        for steps, folder in folders.items():
            write_run(folder, steps)
        shortest = min(folders)
        print(f"first report, with imports: {seconds_of(folders[shortest]):.2f} s")
        times = [{steps: seconds_of(folder) for steps, folder in folders.items()} for _ in range(arguments.rounds)]
        print(f"{'steps':>8} {'seconds':>8} {'page MB':>8} {'x time':>7} {'x steps':>8}")
        for steps, folder in folders.items():
            seconds = statistics.median(row[steps] for row in times)
            quotient = statistics.median(row[steps] / row[shortest] for row in times)
            size = (folder / "report.html").stat().st_size / 1e6
            print(f"{steps:>8} {seconds:>8.3f} {size:>8.2f} {quotient:>7.2f} {steps / shortest:>8.2f}")


if __name__ == "__main__":
    main()
