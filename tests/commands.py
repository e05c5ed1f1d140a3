"""Run the command at sizes that train in seconds, and read the files of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.rollout_files import Sample, read_samples, rollout_files

ROOT = Path(__file__).parents[1]

# Four optimizer steps per rollout, so that the ratio leaves 1 and the clip is active.
SIZES = (
    "max_steps=4",
    "save_steps=2",
    "eval_steps=2",
    "rollout_batch_size=8",
    "num_return_sequences_in_group=4",
    "response_length=32",
    "actor_train.training_args.per_device_train_batch_size=8",
    "actor_train.training_args.gradient_accumulation_steps=1",
    "validation.data_args.num_rows=16",
    "actor_train.data_args.num_rows=128",
    "warm_start=null",
)
REWARD = "my_reward.digits"
REWARD_MODULE = '''
import os
import signal
import time

seen = 0


def digits(prompt, response, ground_truth, at=(), number=0, group=False):
    """Score the share of digits; send the training a signal before the samples numbered in `at`."""
    global seen
    seen += 1
    if seen in at:
        send = os.killpg if group else os.kill
        send(os.getpgid(os.getppid()) if group else os.getppid(), number)
        time.sleep(0.3)
    return sum(c.isdigit() for c in response) / (len(response) + 1)


def coarse(prompt, response, ground_truth):
    return float(len(response) % 8 == 0)


def half(prompt, response, ground_truth):
    return 0.5


def raises(prompt, response, ground_truth):
    raise ValueError("no opinion")


def hangs(prompt, response, ground_truth):
    if len(response) % 4 == 0:
        time.sleep(60)
    return digits(prompt, response, ground_truth)


def not_a_number(prompt, response, ground_truth):
    return float("nan") if len(response) % 2 else digits(prompt, response, ground_truth)
'''
# Prefixes of metrics that may differ between two runs of one seed.
MEASURED = ("time/", "memory/", "rollout/tokens_per_s", "reward/hidden_share", "reward/seconds", "environment/")


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Attributes:
        code: exit status; negative if a signal killed the command.
        out, err: standard output and error.
        seconds: wall time.
    """

    code: int
    out: str
    err: str
    seconds: float


def spawn(*arguments: str, folder: Path, env: dict[str, str] | None = None, limits: str = "") -> Outcome:
    """Run `python -m roll_gspo.run` in `folder` in a new process group; `limits` are options of ulimit."""
    command = [sys.executable, "-m", "roll_gspo.run", *arguments]
    if limits:
        command = ["bash", "-c", f'ulimit {limits}; exec "$@"', "bash", *command]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **(env or {})}
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, start_new_session=True
    )
    return Outcome(done.returncode, done.stdout, done.stderr, time.perf_counter() - started)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def computed(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times and memory: equal bit for bit for equal seeds."""
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in metrics_of(run)]


def rollouts_of(run: Path) -> dict[int, list[Sample]]:
    """Return the samples of rollouts/ by step."""
    return {file.step: read_samples(file.path).samples for file in rollout_files(run / "rollouts")}


def checkpoints_of(run: Path) -> list[str]:
    """Return the names in checkpoints/, including hidden files."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def ids_by_step(run: Path) -> dict[int, list[str]]:
    """Return the prompts of each step; check that the samples of each form whole groups."""
    found: dict[int, list[str]] = {}
    for step, samples in rollouts_of(run).items():
        groups = Counter((sample["group"], sample["id"]) for sample in samples)
        assert len(set(groups.values())) == 1, f"step {step}: {groups}"
        found[step] = [id for _, id in sorted(groups)]
    return found
