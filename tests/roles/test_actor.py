"""The actor on real engines: what an update reports, what it leaves alone, and that the engines agree."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import model_setup, optimizer_setup, train_batch
from tiny_models import write_model

from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.sample_weighting import length_quartiles
from roll_gspo.algorithms.staleness import lag_buckets
from roll_gspo.batch import TrainBatch
from roll_gspo.errors import TrainingError
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.mini_batches import MiniBatches
from roll_gspo.strategies.base import TrainStrategy
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.micro_batches import MicroBatching

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


def actor_of(strategy: TrainStrategy, **changes: int | bool) -> Actor:
    sizes = {
        "mini_batch_size": 3,
        "micro_batching": MicroBatching(2),
        "num_epochs": 2,
        "max_consecutive_skipped_steps": 3,
        "seed": 0,
    }
    return Actor(strategy, LOSS, **(sizes | changes))  # type: ignore[arg-type]


def rollout(actor: Actor) -> TrainBatch:
    """A batch whose old policy is the actor's and whose reference is a little off it."""
    batch = train_batch()
    old = actor.score(batch.sequences).log_probs
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(1)) * batch.response_mask
    return replace(batch, old_log_probs=old, rollout_log_probs=old, ref_log_probs=old + 0.1 * noise)


def with_policy_mask(batch: TrainBatch) -> TrainBatch:
    """The batch with a third of its tokens hidden from the policy loss, and with stale tokens."""
    hidden = torch.rand(batch.response_mask.shape, generator=torch.Generator().manual_seed(2)) < 1 / 3
    quartiles = length_quartiles(batch.response_mask.sum(-1))
    buckets = lag_buckets(torch.arange(batch.response_mask.numel()).reshape(batch.response_mask.shape) % 3)
    seen = batch.response_mask & ~hidden
    assert batch.ref_log_probs is not None
    return replace(
        batch,
        policy_mask=seen,
        length_quartiles=quartiles,
        lag_buckets=buckets,
        rollout_log_probs=batch.ref_log_probs,
    )


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


def test_masks_of_the_policy_loss_do_not_depend_on_the_micro_batches(checkpoint: Path) -> None:
    metrics = []
    for size in (1, 3):
        sizes = {"micro_batching": MicroBatching(size), "num_epochs": 1, "measure_mismatch": True}
        actor = actor_of(hf(checkpoint), **sizes)  # type: ignore[arg-type]
        metrics.append(actor.update(with_policy_mask(rollout(actor)), 1, nothing))
    lags = {f"{name}_lag_{lag}" for name in ("actor/ratio_max", "staleness/ess", "staleness/kl") for lag in range(3)}
    assert lags < set(metrics[0]) == set(metrics[1])
    del metrics[0]["mismatch/ess"]  # averages the values of the micro-batches; staleness/ess is exact
    for name, value in metrics[0].items():
        assert metrics[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    unmasked = actor_of(hf(checkpoint), num_epochs=1)
    assert unmasked.update(rollout(unmasked), 1, nothing)["actor/grad_norm"] != metrics[0]["actor/grad_norm"]


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
    assert "step 1: optimizer step skipped" in caplog.text and "rollouts/step_000001.parquet" in caplog.text
    assert all(str(sample) in caplog.text for sample in good.sample_ids.tolist()), "the samples are named"

    actor.update(good, 2, nothing)  # a good step in between starts the count anew
    actor.update(bad, 3, nothing)
    actor.update(bad, 4, nothing)
    with pytest.raises(
        TrainingError,
        match=r"step 5: actor_train: 3 optimizer steps in a row were not finite"
        r".*actor_train\.training_args\.learning_rate.*max_consecutive_skipped_steps",
    ):
        actor.update(bad, 5, nothing)


def test_first_mini_batch_measures_the_mismatch_to_the_engine_that_sampled(checkpoint: Path) -> None:
    actor = actor_of(hf(checkpoint), num_epochs=1)
    own = actor.update(rollout(actor), 1, nothing)
    assert not [name for name in own if name.startswith("mismatch/")] and own["actor/ratio_noise"] < 1e-5

    actor = actor_of(hf(checkpoint), num_epochs=1, measure_mismatch=True)
    batch = rollout(actor)
    sampled = batch.old_log_probs - 0.25  # an engine that is off by as much everywhere
    batch = replace(batch, old_log_probs=sampled, rollout_log_probs=sampled)
    metrics = actor.update(batch, 1, nothing)
    # later mini-batches, whose policy has moved on, are not in it
    assert metrics["mismatch/log_prob_diff_mean"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["mismatch/log_prob_diff_max"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["mismatch/ratio_rms"] == pytest.approx(0.25, abs=1e-5) and "actor/ratio_noise" not in metrics
    assert metrics["mismatch/kl"] == pytest.approx(math.exp(0.25) - 1.25, abs=1e-5) and metrics["mismatch/ess"] > 0
    again = actor.update(batch, 2, nothing)
    assert again["mismatch/log_prob_diff_max"] > 0.26, "every update measures anew, and this policy has moved on"


def noise_of_first_mini_batch(strategy: TrainStrategy, micro_batching: MicroBatching) -> tuple[float, float]:
    """Return `actor/ratio_noise` and its expected value if the old log-probs of sample i are off by 0.01 (i + 1)."""
    actor = actor_of(strategy, micro_batching=micro_batching)  # type: ignore[arg-type]
    batch = rollout(actor)
    off = 0.01 * (1 + torch.arange(len(batch)))
    batch = replace(batch, old_log_probs=batch.old_log_probs - off[:, None])
    sizes = {"mini_batch_size": 3, "num_epochs": 2, "max_consecutive_skipped_steps": 3, "seed": 0}
    first = next(MiniBatches("actor_train", **sizes).indices(batch, 1))  # type: ignore[arg-type]
    answered = first[batch.response_mask[first].any(-1)]
    found = actor.update(batch, 1, nothing)
    assert "mismatch/ratio_rms" not in found
    return found["actor/ratio_noise"], math.sqrt(float(off[answered].square().mean()))


@pytest.mark.parametrize("micro_batching", [MicroBatching(1), MicroBatching(3), MicroBatching(3, max_tokens=30)])
def test_first_mini_batch_measures_the_noise_of_the_ratio(checkpoint: Path, micro_batching: MicroBatching) -> None:
    found, expected = noise_of_first_mini_batch(hf(checkpoint), micro_batching)
    assert found == pytest.approx(expected, rel=1e-3), "later mini-batches have moved and do not count"


@pytest.mark.megatron
@pytest.mark.parametrize("packed", [False, True])
def test_noise_of_the_ratio_does_not_depend_on_packing(checkpoint: Path, packed: bool) -> None:
    from roll_gspo.strategies.megatron.engine.train import MegatronTrain

    strategy = MegatronTrain(model_setup(checkpoint), optimizer_setup(), MegatronConfig(use_sequence_packing=packed))
    found, expected = noise_of_first_mini_batch(strategy, MicroBatching(3, max_tokens=30, packed=packed))
    assert found == pytest.approx(expected, rel=1e-3)


def test_mini_batch_that_is_masked_whole_takes_no_step(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    actor = actor_of(hf(checkpoint), num_epochs=1, max_consecutive_skipped_steps=1, measure_mismatch=True)
    batch = rollout(actor)
    first, second = MiniBatches(
        "actor_train", mini_batch_size=3, num_epochs=1, max_consecutive_skipped_steps=1, seed=0
    ).indices(batch, 1)
    mask = batch.response_mask.clone()
    mask[first] = False
    masked = replace(batch, sequences=replace(batch.sequences, response_mask=mask))
    metrics = actor.update(masked, 1, nothing)
    assert metrics["actor/num_updates"] == 1 and metrics["actor/skipped_updates"] == 1
    assert "step 1: actor_train: no optimizer step, all 3 samples are masked" in caplog.text
    assert metrics["mismatch/log_prob_diff_max"] < 1e-5, "the first mini-batch with a token is still on-policy"

    alone = actor_of(hf(checkpoint), mini_batch_size=3, num_epochs=1)
    expected = alone.update(batch.rows(second), 1, nothing)
    for name in ("actor/total_loss", "actor/grad_norm", "actor/lr", "actor/ratio_max"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
    theirs = dict(alone.weights())
    assert all(torch.allclose(weight, theirs[name], atol=1e-5) for name, weight in actor.weights())


@pytest.mark.megatron
def test_megatron_and_transformers_train_the_same_policy(checkpoint: Path) -> None:
    from roll_gspo.strategies.megatron.engine.train import MegatronTrain

    ours = actor_of(MegatronTrain(model_setup(checkpoint), optimizer_setup(), MegatronConfig()))
    oracle = actor_of(hf(checkpoint))
    batch = with_policy_mask(rollout(oracle))
    torch.testing.assert_close(ours.score(batch.sequences).log_probs, batch.old_log_probs, atol=1e-4, rtol=0)
    found, expected = ours.update(batch, 1, nothing), oracle.update(batch, 1, nothing)
    assert set(found) == set(expected)
    for name in ("actor/total_loss", "actor/grad_norm", "actor/kl_loss", "actor/ratio_mean", "actor/lr"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    theirs = dict(oracle.weights())
    for name, tensor in ours.weights():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=1e-5, msg=name)
