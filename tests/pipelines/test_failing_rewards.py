"""Rewards that fail in every way inside a training: it goes on, and what failed is marked, masked and counted."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, metrics_of, rollouts_of

Command = Callable[..., Outcome]
REWARDS = """
import os, re, time

WAYS = {
    "hangs": lambda: time.sleep(600),
    "hangs in C": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "crashes": lambda: os._exit(3),
    "is killed": lambda: os.kill(os.getpid(), 9),
    "takes memory": lambda: bytearray(8 << 30),
    "nan": lambda: float("nan"),
    "text": lambda: "1.0",
    "raises": lambda: {}["no such key"],
}

def hostile(prompt, response, ground_truth, way):
    if len(response) % 2 and way in WAYS:
        return WAYS[way]()
    return float(len(response) % 3)

class WrongCount:
    def score_batch(self, requests):
        return [len(r.response) % 4 / 4 for r in requests[:-1 if any(len(r.response) % 2 for r in requests) else None]]
"""
WAYS = {
    "hangs": "timeout after 1 s",
    "hangs in C": "timeout after 1 s",
    "crashes": "died (exit code 3)",
    "is killed": "died (signal 9",
    "takes memory": "MemoryError",
    "nan": "returned nan, not a finite number",
    "text": "returned '1.0', not a number",
    "raises": "KeyError",
}
DOMAINS = ("hostile", "batches", "halves", "silent")
HF = ("--config-name", "example_gspo", "strategy=hf", "tracker=none", "max_steps=1", "run_name=run", "validation=null")
BLOCKS = (
    "~rewards.column_addition",
    "+rewards.hostile={worker_cls: my_hostile.hostile, world_size: 4, timeout_s: 1.0, max_memory_mb: 500}",
    "+rewards.batches={worker_cls: my_hostile.WrongCount, world_size: 1, infer_batch_size: 2}",
    "+rewards.halves={worker_cls: my_reward.half}",
    "+rewards.silent={worker_cls: my_reward.raises}",
    "actor_train.data_args.file_name=rows.jsonl",
    "rollout_batch_size=12",
)
ROWS = [
    *({"domain": "hostile", "way": way} for way in WAYS),
    *({"domain": d} for d in ("batches", "batches", "halves")),
]
RUN = Path("out/example_gspo/run")


def test_training_goes_on_without_the_samples_whose_reward_failed(command: Command, small: tuple[str, ...]) -> None:
    Path("my_hostile.py").write_text(REWARDS)
    rows = [*ROWS, {"domain": "silent"}]
    lines = [{"question": f"{i + 10}+{i + 20}=", "answer": "1", "way": "", **row} for i, row in enumerate(rows)]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = [a for a in small if not a.startswith(("rewards.", "validation."))]
    outcome = command(*HF, *kept, *BLOCKS, "max_steps=1")
    assert outcome.code == 0, outcome.out + outcome.err
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score ")]

    samples = rollouts_of(RUN)[1]
    failed = [s for s in samples if s["failed"]]
    hostile = [s for s in samples if s["domain"] == "hostile"]
    odd = [s for s in hostile if len(re.sub(r"<\|\w+\|>", "", s["response"])) % 2]
    assert odd and len(odd) < len(hostile) and odd == [s for s in hostile if s["failed"]], "these and no others"
    ways = {way for i, way in enumerate(WAYS) if any(f"{i + 10}+{i + 20}=" in s["prompt"] for s in odd)}
    assert len(ways) > 5 and not [way for way in ways if WAYS[way] not in outcome.out]
    assert all(s["failed"] for s in samples if s["domain"] == "silent")

    row = metrics_of(RUN)[0]
    assert row["actor/num_updates"] > 0 and row["actor/grad_norm"] > 0
    assert row["reward/failed"] == len(failed) == sum(row[f"domain/{d}/failed"] for d in DOMAINS)
    assert all(s["advantage"] == 0 for s in failed) and row["actor/masked_fraction"] >= len(failed) / len(samples)
    scores = [s["score"] for s in samples if not s["failed"]]
    assert row["rollout/score_mean"] == pytest.approx(sum(scores) / len(scores)), "a failure is no score of 0"
    assert row["reward/score_mean"] == row["rollout/score_mean"]
    assert row["domain/halves/score_mean"] == 0.5 and row["domain/halves/num_samples"] == 4
    assert 0 <= row["reward/hidden_share"] <= 1
    assert "rewards.silent: 4 of 4 samples failed and are not trained on, most often (4 times): Value" in outcome.out
    assert row["domain/silent/failed"] == 4 and "domain/silent/score_mean" not in row
