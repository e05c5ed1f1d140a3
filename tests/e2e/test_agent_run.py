"""Runs in which a program of the user plays the episodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from agent_programs import RUN
from commands import Outcome, metrics_of

SIZES = (
    *("max_steps=1", "eval_steps=1", "save_steps=1", "rollout_batch_size=4", "num_return_sequences_in_group=4"),
    *("actor_train.training_args.per_device_train_batch_size=8", "warm_start=null", "strategy=hf"),
    *("actor_train.training_args.gradient_accumulation_steps=1", "response_length=64"),
    *("output_dir=out", "run_name=run", "rewards=null", "pretrain=builtin:tiny_qwen3"),
    "validation.data_args.num_rows=4",
)


@pytest.fixture
def agent(workplace: Path) -> str:
    (workplace / "my_agent.py").write_text(RUN)
    return "agent.command=python my_agent.py"


def test_program_is_trained(command: Callable[..., Outcome], workplace: Path, agent: str):
    outcome = command("--config-name", "example_gspo", *SIZES, agent)
    assert outcome.code == 0, outcome.err
    metrics = metrics_of(workplace / "out" / "example_gspo" / "run")[-1]
    assert 0 < metrics["reward/mean"] < 2
    assert metrics["episode/turns_mean"] == 2
    assert metrics["env/agent/answers"] == 2
    assert metrics["episode/end_done"] == 1
    running = psutil.Process().children(recursive=True)
    assert not [child for child in running if "my_agent.py" in " ".join(child.cmdline())]


def test_run_stops_if_the_program_fails(command: Callable[..., Outcome], agent: str):
    outcome = command("--config-name", "example_gspo", *SIZES, agent, "agent.env.FAIL='1'")
    assert outcome.code != 0
    assert "16 of 16 episodes failed" in outcome.err
    assert "agent.command: exit code 1" in outcome.err
    assert "RuntimeError: broken" in outcome.err
