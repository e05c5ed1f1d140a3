"""Time per training step with generation ahead of training, against generating and training in turn.

    python benchmarks/asynchronous.py [--rounds 3] [--steps 12] [--skip 4] [key=value ...]

Each round trains `example_gspo` once per mode with `execution: ray`, in alternating order: the trainer and one engine
run in separate processes with one thread each. The policy has random weights, so nearly every response has the maximum
length, and the sizes make generation take about half of a synchronous step. The table shows the median seconds per
step after the first ones, from `metrics.jsonl`, and the median of the rounds' ratios. Validation is off. With n cores
busy with other work, processes wait for each other, so the load is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

MODES = {
    "synchronous": [],
    "one_step_off, ratio 1": ["async_generation_ratio=1"],
    "in_flight, ratio 2": ["async_generation_ratio=2", "async_mode=in_flight"],
}
# Trainer and engine are plain transformers, whose speed differs less between runs than that of compiled engines.
OVERRIDES = [
    "strategy=hf",
    "execution=ray",
    "warm_start=null",
    "validation=null",
    "tracker=none",
    "log_rollouts=null",
    "rollout_batch_size=16",
    "response_length=96",
    "save_steps=100000",
    "system_envs={OMP_NUM_THREADS: '1'}",
    "rewards.column_addition.world_size=1",
]


class Run(NamedTuple):
    """Medians over the steps of a run, in seconds.

    Attributes:
        step: seconds per step.
        generate: seconds of generation that the trainer waited for.
        load: mean number of runnable processes on the machine at the end of the run.
    """

    step: float
    generate: float
    load: float


def run(mode: str, steps: int, skip: int, overrides: list[str]) -> Run:
    """Train once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "roll_gspo.run", "--config-name", "example_gspo", *OVERRIDES, *MODES[mode]]
        command += [f"max_steps={steps}", f"output_dir={folder}", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}  # Ray's default is 15
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode:
            raise SystemExit(f"{mode}: the run failed\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")
        (path,) = Path(folder).rglob("metrics.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "time/step" in row][skip:]
    waited = [row.get("time/generate", 0.0) + row.get("time/wait_rollouts", 0.0) for row in rows]
    return Run(statistics.median(row["time/step"] for row in rows), statistics.median(waited), os.getloadavg()[0])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--skip", type=int, default=4, help="first steps, which are not counted")
    arguments, overrides = parser.parse_known_args()
    runs: dict[str, list[Run]] = {mode: [] for mode in MODES}
    for number in range(arguments.rounds):
        for mode in list(MODES)[:: -1 if number % 2 else 1]:
            runs[mode].append(run(mode, arguments.steps, arguments.skip, overrides))
            step, waited, load = runs[mode][-1]
            print(f"round {number}: {mode}: {step:.2f} s, {waited:.2f} s for samples, load {load:.1f}", flush=True)
    print("| mode | s per step | of these for samples | times faster | load |\n|---|---|---|---|---|")
    for mode, own in runs.items():
        ratio = statistics.median(a.step / b.step for a, b in zip(runs["synchronous"], own, strict=True))
        step, waited, load = (statistics.median(values) for values in zip(*own, strict=True))
        print(f"| {mode} | {step:.2f} | {waited:.2f} | {ratio:.2f} | {load:.1f} |")


if __name__ == "__main__":
    main()
