"""The whole loop, differentially: one rollout through a role on each training engine ends in the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    Checkpoints,
    model_setup,
    optimizer_setup,
    train_batch,
    value_batch,
    value_weights,
    with_random_head,
)
from torch import Tensor

from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.value_loss import ValueLossSettings
from roll_gspo.batch import TrainBatch
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.critic import Critic
from roll_gspo.strategies.base import OptimizerSetup
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.hf.value import HfValue
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.micro_batches import MicroBatching

megatron = pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)

pytestmark = pytest.mark.megatron

# as of a real run, but for fewer steps: 1e-5 is a hundredth of what a single step moves a weight by
ADAM = optimizer_setup(learning_rate=1e-3, warmup_steps=0, max_grad_norm=1.0)
# Adam with a large epsilon steps along the gradient itself: the weights then show every element of it
ALONG_THE_GRADIENT = optimizer_setup(
    learning_rate=1.0, epsilon=100.0, warmup_steps=0, max_grad_norm=0.0, weight_decay=0.0, lr_scheduler_type="constant"
)
OPTIMIZERS = [pytest.param(ADAM, id="adam"), pytest.param(ALONG_THE_GRADIENT, id="along_the_gradient")]
FAMILIES = ["qwen3_tied", "qwen3_moe"]
SIZES: dict[str, Any] = {
    "mini_batch_size": 3,
    "micro_batching": MicroBatching(2),
    "num_epochs": 1,
    "max_consecutive_skipped_steps": 1,
    "seed": 0,
}


def objective(**changes: object) -> PolicyLossSettings:
    values = {
        "importance_sampling": "token",
        "clip_low": 0.2,
        "clip_high": 0.27,
        "dual_clip_ratio": None,
        "loss_agg_mode": "token-mean",
        "response_length": 16,
        "kl_loss_coef": 0.1,
    }
    return PolicyLossSettings(**(values | changes))  # type: ignore[arg-type]


OBJECTIVES = {
    "gspo": objective(importance_sampling="seq", clip_low=3e-4, clip_high=4e-4, loss_agg_mode="seq-mean-token-mean"),
    "grpo": objective(dual_clip_ratio=1.4),
    "cispo": objective(policy_loss="cispo", entropy_loss_coef=0.01),
}


def policy_rollout(folder: Path, objective_name: str) -> TrainBatch:
    """Scored by plain transformers; some ratios are near 1, some beyond the range that the objective clips."""
    batch = train_batch()
    mask = batch.response_mask
    now = HfTrain(model_setup(folder), ADAM, HfConfig()).score(batch.sequences).log_probs
    generator = torch.Generator().manual_seed(3)
    near, far = (torch.randn(mask.shape, generator=generator) * mask for _ in range(2))
    width = 1e-3 if objective_name == "gspo" else 0.3
    weights = torch.linspace(0.5, 1.5, len(batch))
    return replace(
        batch, old_log_probs=now + width * near, rollout_log_probs=now, ref_log_probs=now + far, sample_weights=weights
    )


def agree(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        moved = (weight - start[name]).norm()
        assert moved > 0 and (found[name] - weight).norm() < 1e-3 * moved, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_update_is_the_same_on_both_engines(
    checkpoint: Checkpoints, name: str, family: str, optimizer: OptimizerSetup
) -> None:
    setup, settings = model_setup(checkpoint(family)), OBJECTIVES[name]
    batch = policy_rollout(checkpoint(family), name)
    found = Actor(megatron.MegatronTrain(setup, optimizer, MegatronConfig()), settings, **SIZES, measure_mismatch=True)
    expected = Actor(HfTrain(setup, optimizer, HfConfig()), settings, **SIZES, measure_mismatch=True)
    start = {key: weight.clone() for key, weight in expected.weights()}
    metrics = [role.update(batch, 1, lambda *_: None) for role in (found, expected)]
    agree(*metrics)
    assert metrics[0]["actor/num_updates"] == 2 and metrics[0]["actor/kl_loss"] > 0
    assert metrics[0]["actor/grad_norm"] > 0.01 and 0 < metrics[0]["actor/clip_fraction"] < 1
    same_weights(dict(found.weights()), dict(expected.weights()), start)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_value_update_is_the_same_on_both_engines(
    checkpoint: Checkpoints, family: str, optimizer: OptimizerSetup
) -> None:
    setup, settings = model_setup(checkpoint(family)), ValueLossSettings(value_clip=0.5)
    theirs = with_random_head(HfValue(setup, optimizer, HfConfig()))
    ours = with_random_head(megatron.MegatronValue(setup, optimizer, MegatronConfig()))
    batch, start = value_batch(), {key: weight.clone() for key, weight in value_weights(theirs).items()}
    found, expected = Critic(ours, settings, **SIZES), Critic(theirs, settings, **SIZES)
    torch.testing.assert_close(found.values(batch.sequences), expected.values(batch.sequences), rtol=0, atol=1e-5)
    metrics = [role.update(batch, 1, lambda *_: None) for role in (found, expected)]
    agree(*metrics)
    assert metrics[0]["critic/num_updates"] == 2 and 0 < metrics[0]["critic/clip_fraction"] < 1
    same_weights(value_weights(ours), value_weights(theirs), start)
    torch.testing.assert_close(found.values(batch.sequences), expected.values(batch.sequences), rtol=0, atol=1e-4)
