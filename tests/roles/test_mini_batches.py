"""Mini-batches of a rollout: which samples meet, and what is done about optimizer steps that are not taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import train_batch

from roll_gspo.batch import TrainBatch
from roll_gspo.errors import TrainingError
from roll_gspo.metrics import Metric
from roll_gspo.roles.mini_batches import MiniBatches, summary
from roll_gspo.strategies.base import UpdateResult


def mini_batches(seed: int = 0, size: int = 3, num_epochs: int = 2, max_skipped: int = 2) -> MiniBatches:
    return MiniBatches(
        "critic", mini_batch_size=size, num_epochs=num_epochs, max_consecutive_skipped_steps=max_skipped, seed=seed
    )


def result(loss: float = 2.0, grad_norm: float = 1.0, applied: bool = True) -> UpdateResult:
    metrics = {"critic/loss": Metric(torch.tensor(loss), torch.ones(()), "sum")}
    return UpdateResult(loss, grad_norm, 1e-3, applied, metrics)


def nothing(done: int, total: int) -> None:
    """No one watches."""


def masked(batch: TrainBatch, rows: list[int]) -> TrainBatch:
    mask = batch.response_mask.clone()
    mask[rows] = False
    return replace(batch, sequences=replace(batch.sequences, response_mask=mask))


def test_mini_batches_depend_on_seed_step_and_epoch_and_cover_the_rollout() -> None:
    batch = train_batch()

    def drawn(seed: int, step: int) -> list[list[int]]:
        return [sorted(index.tolist()) for index in mini_batches(seed).indices(batch, step)]

    first = drawn(0, 1)
    half = len(first) // 2
    for epoch in (first[:half], first[half:]):
        assert sorted(i for index in epoch for i in index) == list(range(len(batch)))
    assert first == drawn(0, 1)
    assert first != drawn(0, 2) and first != drawn(1, 1) and first[:half] != first[half:]


def test_samples_of_a_mini_batch_are_in_order_of_length() -> None:
    batch = train_batch()
    for index in mini_batches().indices(batch, 1):
        lengths = batch.sequences.lengths[index]
        assert torch.equal(lengths, lengths.sort().values)


def test_summary_is_the_mean_over_the_steps_that_were_computed() -> None:
    metrics = summary([result(2.0, 1.0), None, result(4.0, 3.0), result(6.0, 5.0, applied=False)], "critic")
    assert metrics == {
        "critic/loss": 4.0,
        "critic/grad_norm": 3.0,
        "critic/lr": 1e-3,
        "critic/num_updates": 2.0,
        "critic/skipped_updates": 2.0,
    }
    assert summary([None, None], "critic") == {"critic/num_updates": 0.0, "critic/skipped_updates": 2.0}


def test_masked_mini_batches_are_skipped_but_never_counted_as_not_finite() -> None:
    batch, seen, progress = train_batch(), [], []

    def step(mini_batch: TrainBatch) -> UpdateResult:
        seen.append(mini_batch.sample_ids.tolist())
        return result()

    nothing_valid = masked(batch, list(range(len(batch))))
    loop = mini_batches(max_skipped=1)
    results = loop.train(nothing_valid, 1, step, lambda *done: progress.append(done))
    assert results == [None] * 4 and not seen and progress == [(n, 4) for n in range(1, 5)]
    # one valid token is enough: sample 4 and its two neighbours
    results = loop.train(masked(batch, [0, 1, 2, 3, 5]), 1, step, nothing)
    assert sum(r is not None for r in results) == 2 == len(seen) and all(4 in samples for samples in seen)


def test_steps_that_are_not_finite_are_counted_across_rollouts_and_masked_mini_batches() -> None:
    batch = train_batch()
    loop = mini_batches(size=len(batch), num_epochs=1, max_skipped=2)
    loop.train(batch, 1, lambda _: result(float("nan"), applied=False), nothing)
    loop.train(masked(batch, list(range(len(batch)))), 2, lambda _: result(), nothing)  # says nothing about the run
    with pytest.raises(
        TrainingError, match=r"^step 3: critic: 2 optimizer steps in a row were not finite \(last loss nan"
    ):
        loop.train(batch, 3, lambda _: result(float("nan"), applied=False), nothing)
