"""The critic on a real engine: what an update reports, that it learns, and that it goes on where it was saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import model_setup, optimizer_setup, value_batch
from tiny_models import write_model

from roll_gspo.algorithms.value_loss import ValueLossSettings, explained_variance
from roll_gspo.batch import TrainBatch
from roll_gspo.errors import TrainingError
from roll_gspo.roles.critic import Critic
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.value import HfValue
from roll_gspo.strategies.micro_batches import MicroBatching

FIGURES = {"loss", "value_mean", "return_mean", "clip_fraction", "grad_norm", "lr", "num_updates", "skipped_updates"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("critic"), "qwen3_tied")


def critic_of(checkpoint: Path, value_clip: float | None = None, **changes: int) -> Critic:
    sizes: dict[str, Any] = {
        "mini_batch_size": 3,
        "micro_batching": MicroBatching(2),
        "num_epochs": 2,
        "max_consecutive_skipped_steps": 3,
        "seed": 0,
    }
    optimizer = optimizer_setup(learning_rate=3e-3, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0)
    engine = HfValue(model_setup(checkpoint), optimizer, HfConfig())
    return Critic(engine, ValueLossSettings(value_clip), **(sizes | changes))


def rollout(critic: Critic) -> TrainBatch:
    """A batch whose earlier values are the critic's."""
    batch = value_batch()
    return replace(batch, values=critic.values(batch.sequences))


def nothing(done: int, total: int) -> None:
    """No one watches."""


def test_update_reports_means_over_its_optimizer_steps(checkpoint: Path) -> None:
    critic = critic_of(checkpoint)
    batch = rollout(critic)
    seen: list[tuple[int, int]] = []
    metrics = critic.update(batch, 1, lambda *done: seen.append(done))
    assert metrics.keys() == {f"critic/{figure}" for figure in FIGURES}
    assert seen == [(n, 4) for n in range(1, 5)]
    assert metrics["critic/num_updates"] == 4 and metrics["critic/skipped_updates"] == 0
    assert metrics["critic/loss"] > 0 and metrics["critic/grad_norm"] > 0 and metrics["critic/lr"] == 3e-3
    assert batch.returns is not None and metrics["critic/clip_fraction"] == 0
    assert metrics["critic/return_mean"] == pytest.approx(float(batch.returns[batch.response_mask].mean()), rel=1e-5)


def test_values_come_to_explain_the_returns(checkpoint: Path) -> None:
    critic = critic_of(checkpoint, num_epochs=1)
    batch = rollout(critic)
    assert batch.returns is not None
    losses = [critic.update(batch, step, nothing)["critic/loss"] for step in range(1, 31)]
    assert losses[-1] < 0.1 * losses[0]
    values = critic.values(batch.sequences)
    assert explained_variance(values, batch.returns, batch.response_mask) > 0.8


def test_value_clip_holds_values_near_those_of_the_rollout(checkpoint: Path) -> None:
    free, held = critic_of(checkpoint, num_epochs=15), critic_of(checkpoint, 0.01, num_epochs=15)
    moved = []
    for critic in (free, held):
        batch = rollout(critic)
        batch = replace(batch, returns=torch.ones_like(batch.advantages))
        metrics = critic.update(batch, 1, nothing)
        moved.append(float(critic.values(batch.sequences)[batch.response_mask].mean()))
    assert metrics["critic/clip_fraction"] > 0.5 and moved[0] > 0.8
    assert 0.01 < moved[1] < 0.7 * moved[0], "momentum carries it beyond the bound, the gradient does not"


def test_update_that_is_not_finite_stops_the_run_in_the_end(checkpoint: Path) -> None:
    critic = critic_of(checkpoint, num_epochs=1, max_consecutive_skipped_steps=2)
    batch = rollout(critic)
    bad = replace(batch, returns=torch.full_like(batch.advantages, float("inf")))
    with pytest.raises(
        TrainingError, match=r"critic: 2 optimizer steps in a row.*critic\.training_args\.learning_rate"
    ):
        critic.update(bad, 1, nothing)
    assert torch.equal(critic.values(batch.sequences), batch.values), "and it has changed nothing"


def test_rollout_that_is_masked_whole_teaches_nothing(checkpoint: Path) -> None:
    critic = critic_of(checkpoint)
    batch = rollout(critic)
    mask = torch.zeros_like(batch.response_mask)
    masked = replace(batch, sequences=replace(batch.sequences, response_mask=mask))
    assert critic.update(masked, 1, nothing) == {"critic/num_updates": 0.0, "critic/skipped_updates": 4.0}
    assert torch.equal(critic.values(batch.sequences), batch.values)


def test_saved_critic_goes_on_as_if_nothing_had_been(checkpoint: Path, tmp_path: Path) -> None:
    whole, resumed = critic_of(checkpoint), critic_of(checkpoint)
    batch = rollout(whole)
    whole.update(batch, 1, nothing)
    whole.save(tmp_path)
    resumed.load(tmp_path)
    assert torch.equal(resumed.values(batch.sequences), whole.values(batch.sequences))
    assert resumed.update(batch, 2, nothing) == whole.update(batch, 2, nothing)
    assert torch.equal(resumed.values(batch.sequences), whole.values(batch.sequences))
