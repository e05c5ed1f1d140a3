"""The actor on real engines: what an update reports, what it leaves alone, and that the engines agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import model_setup, optimizer_setup, train_batch
from tiny_models import write_model

from roll_gspo.algorithms.policy_loss import PolicyLossSettings
from roll_gspo.batch import TrainBatch
from roll_gspo.config.strategy import HfConfig, MegatronConfig
from roll_gspo.errors import TrainingError
from roll_gspo.roles.actor import Actor
from roll_gspo.strategies.base import TrainStrategy
from roll_gspo.strategies.hf.train import HfTrain

LOSS = PolicyLossSettings(
    importance_sampling="seq",
    clip_low=3e-4,
    clip_high=4e-4,
    dual_clip_ratio=1.4,
    loss_agg_mode="seq-mean-token-mean",
    response_length=16,
    kl_loss_coef=0.01,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actor")
    write_model(folder, "qwen3_tied")
    return folder


def hf(checkpoint: Path) -> TrainStrategy:
    return HfTrain(model_setup(checkpoint), optimizer_setup(), HfConfig())


def actor_of(strategy: TrainStrategy, **changes: int) -> Actor:
    sizes = {
        "mini_batch_size": 3,
        "micro_batch_size": 2,
        "num_epochs": 2,
        "max_consecutive_skipped_steps": 3,
        "seed": 0,
    }
    return Actor(strategy, LOSS, **(sizes | changes))


def rollout(actor: Actor) -> TrainBatch:
    """A batch whose old policy is the actor's and whose reference is a little off it."""
    batch = train_batch()
    old = actor.score(batch.sequences).log_probs
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(1)) * batch.response_mask
    return replace(batch, old_log_probs=old, rollout_log_probs=old, ref_log_probs=old + 0.1 * noise)


def nothing(done: int, total: int) -> None:
    """No one watches."""


def test_update_makes_every_optimizer_step_and_reports_means_over_them(checkpoint: Path) -> None:
    actor = actor_of(hf(checkpoint))
    batch = rollout(actor)
    seen: list[tuple[int, int]] = []
    metrics = actor.update(batch, step=1, progress=lambda done, total: seen.append((done, total)))
    assert len(batch) % 3 == 0
    num_updates = 2 * len(batch) // 3
    assert seen == [(i, num_updates) for i in range(1, num_updates + 1)]
    assert metrics["actor/num_updates"] == num_updates and metrics["actor/skipped_updates"] == 0
    assert metrics["actor/total_loss"] == pytest.approx(metrics["actor/pg_loss"] + 0.01 * metrics["actor/kl_loss"])
    assert metrics["actor/ratio_min"] < 1 < metrics["actor/ratio_max"], "later mini-batches are off-policy"
    assert metrics["actor/grad_norm"] > 0 and metrics["actor/lr"] > 0


def test_mini_batches_depend_on_seed_step_and_epoch_and_cover_the_rollout(checkpoint: Path) -> None:
    actor, other = actor_of(hf(checkpoint)), actor_of(hf(checkpoint), seed=1)
    batch = rollout(actor)

    def drawn(actor: Actor, step: int) -> list[list[int]]:
        return [sorted(index.tolist()) for index in actor._mini_batches(batch, step)]

    first = drawn(actor, 1)
    half = len(first) // 2
    for epoch in (first[:half], first[half:]):
        assert sorted(i for index in epoch for i in index) == list(range(len(batch)))
    assert first == drawn(actor, 1)
    assert first != drawn(actor, 2) and first != drawn(other, 1) and first[:half] != first[half:]


def test_update_that_is_not_finite_changes_nothing_is_counted_and_stops_the_run_in_the_end(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    actor = actor_of(hf(checkpoint), mini_batch_size=len(train_batch()), num_epochs=1)
    good = rollout(actor)
    bad = replace(good, advantages=torch.full_like(good.advantages, float("inf")))
    before = {name: tensor.clone() for name, tensor in actor.weights()}
    metrics = actor.update(bad, 1, nothing)
    assert metrics["actor/num_updates"] == 0 and metrics["actor/skipped_updates"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in actor.weights())
    assert "step 1: optimizer step skipped" in caplog.text and "rollouts/step_000001.jsonl" in caplog.text
    assert all(str(sample) in caplog.text for sample in good.sample_ids.tolist()), "the samples are named"

    actor.update(good, 2, nothing)  # a good step in between starts the count anew
    actor.update(bad, 3, nothing)
    actor.update(bad, 4, nothing)
    with pytest.raises(
        TrainingError, match=r"3 optimizer steps in a row were not finite.*max_consecutive_skipped_steps"
    ):
        actor.update(bad, 5, nothing)


@pytest.mark.megatron
def test_megatron_and_transformers_train_the_same_policy(checkpoint: Path) -> None:
    from roll_gspo.strategies.megatron.train import MegatronTrain

    ours = actor_of(MegatronTrain(model_setup(checkpoint), optimizer_setup(), MegatronConfig()))
    oracle = actor_of(hf(checkpoint))
    batch = rollout(oracle)
    torch.testing.assert_close(ours.score(batch.sequences).log_probs, batch.old_log_probs, atol=1e-4, rtol=0)
    found, expected = ours.update(batch, 1, nothing), oracle.update(batch, 1, nothing)
    for name in ("actor/total_loss", "actor/grad_norm", "actor/kl_loss", "actor/ratio_mean", "actor/lr"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    theirs = dict(oracle.weights())
    for name, tensor in ours.weights():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=1e-5, msg=name)
