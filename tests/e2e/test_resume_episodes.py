"""Interrupted and killed runs with episodes: every row is trained once, with the same tokens."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import Outcome, computed, ids_by_step, metrics_of, rollouts_of
from forked_command import train

from roll_gspo.checkpoint import complete_checkpoints
from roll_gspo.pipelines.rlvr.rollout_state import SAMPLES

pytestmark = pytest.mark.e2e

Command = Callable[..., Outcome]
RUNS = Path("out/example_agentic_gspo")
GAME = "custom_envs.game={env_type: my_game.Lengths, max_steps: 3, max_tokens_per_step: 6, env_config: %s}"
PROBES = 1  # episodes that the check of the data begins
PER_STEP = 4  # episodes
ARGUMENTS = (
    *("--config-name", "example_agentic_gspo", "strategy=hf", "validation=null", "warm_start=null"),
    *("rollout_batch_size=2", "num_return_sequences_in_group=2", "response_length=64", "save_steps=1"),
    *("actor_train.training_args.per_device_train_batch_size=4", "train_env_manager.world_size=1"),
    "train_env_manager.tags=[game]",
    *("actor_train.training_args.gradient_accumulation_steps=1", "actor_train.data_args.num_rows=32"),
    # Environments answer at different times. Alone, a row does not depend on those that decode with it.
    "actor_infer.strategy_args.strategy_config.generate_batch_size=1",
    "output_dir=out",
)
RESUME = ("resume_from_checkpoint=true", "resume_with_changes=true")  # the first process had a game with a signal
MODULE = '''
import itertools
import os
import time

from roll_gspo.environments import Environment, Reply, Start

started = itertools.count(1)


class Lengths(Environment):
    """Rewards lengths; sends the training a signal at the beginning of episode number `at`."""

    def __init__(self, at=0, number=0):
        self.at, self.number, self.turns = at, number, 0

    def reset(self, row, seed):
        if next(started) == self.at:
            os.kill(os.getppid(), self.number)
            time.sleep(0.3)
        return Start(({"role": "user", "content": str(seed)},))

    def step(self, answer):
        self.turns += 1
        message = {"role": "user", "content": f"{self.turns}?"}
        return Reply((message,), reward=len(answer) % 4, done=self.turns == 3)
'''


def arguments(name: str, steps: int, *others: str, signal_at: tuple[int, int] | None = None) -> tuple[str, ...]:
    at, number = signal_at or (0, 0)
    game = GAME % f"{{at: {at}, number: {number}}}"
    return (*ARGUMENTS, game, f"run_name={name}", f"max_steps={steps}", *others)


@pytest.fixture(autouse=True)
def game(workplace: Path) -> None:
    (workplace / "my_game.py").write_text(MODULE)


def turns_of(run: Path) -> dict[int, Any]:
    return {step: [sample["turns"] for sample in samples] for step, samples in rollouts_of(run).items()}


def assert_same(run: Path, whole: Path) -> None:
    assert computed(run) == computed(whole)
    assert rollouts_of(run) == rollouts_of(whole)
    assert all(len(turns) == 3 for found in turns_of(run).values() for turns in found)
    trained = ids_by_step(run)
    assert len(set().union(*trained.values())) == sum(map(len, trained.values())), "every row is trained once"


def test_interrupted_run_resumes_to_the_same_result(command: Command) -> None:
    assert command(*arguments("whole", 2)).code == 0
    assert any(row["actor/grad_norm"] > 0 for row in metrics_of(RUNS / "whole")[-2:])
    outcome = command(*arguments("again", 2, signal_at=(PROBES + 3, signal.SIGINT)))
    assert outcome.code == 128 + signal.SIGINT and "step 1 of 2" in outcome.out, outcome.out + outcome.err
    outcome = command(*arguments("again", 2, *RESUME))
    assert outcome.code == 0 and "resumed after step 1" in outcome.out, outcome.out + outcome.err
    assert_same(RUNS / "again", RUNS / "whole")


def test_killed_run_ahead_of_training_resumes_to_the_same_result(command: Command, workplace: Path) -> None:
    ahead = "async_generation_ratio=1"
    assert command(*arguments("whole", 4, ahead)).code == 0
    kill = PROBES + 3 * PER_STEP + 2, signal.SIGKILL
    outcome = train(*arguments("again", 4, ahead, signal_at=kill), folder=workplace)
    assert outcome.code == -signal.SIGKILL, outcome.out + outcome.err
    saved = complete_checkpoints(RUNS / "again/checkpoints")[-1]
    kept = [json.loads(text) for text in pq.read_table(saved.folder / SAMPLES)["episode"].to_pylist()]
    assert len(kept) == PER_STEP and all(len(episode["turns"]) == 3 for episode in kept), "the next batch"
    outcome = command(*arguments("again", 4, ahead, *RESUME))
    assert outcome.code == 0 and "resumed after step" in outcome.out, outcome.out + outcome.err
    assert_same(RUNS / "again", RUNS / "whole")
