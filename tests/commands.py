"""The command, in this process or in one of its own, at sizes that train in seconds; and what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# 4 optimizer steps a rollout, so that the ratio leaves 1 and the clip acts; scores that differ even without training.
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
    "warm_start=null",
)
REWARD = "my_reward.digits"
REWARD_MODULE = '''
import os
import signal
import time

seen = 0


def digits(prompt, response, ground_truth, at=(), number=0, group=False):
    """The share of digits; before the samples counted in `at` are scored, the training is sent a signal."""
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
# Which figures of two runs of one seed may differ.
MEASURED = ("time/", "memory/", "rollout/tokens_per_s", "reward/hidden_share", "reward/seconds")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit status, negative where a signal killed it.
        out, err: what it printed.
        seconds: wall time.
    """

    code: int
    out: str
    err: str
    seconds: float


def spawn(*arguments: str, folder: Path, env: dict[str, str] | None = None, limits: str = "") -> Outcome:
    """`python -m roll_gspo.run` in a process group of its own, in `folder`; `limits` are options of ulimit."""
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
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def computed(run: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without what is measured: the same for the same seed, bit for bit."""
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in metrics_of(run)]


def rollouts_of(run: Path) -> dict[str, str]:
    """The files of rollouts/ by name."""
    return {file.name: file.read_text(encoding="utf-8") for file in sorted((run / "rollouts").iterdir())}


def checkpoints_of(run: Path) -> list[str]:
    """Everything in checkpoints/, hidden files too."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())
