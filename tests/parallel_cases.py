"""Functions that every rank of a world runs in the tests of parallel layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_cases import demonstrations, model_setup, optimizer_setup, policy_loss, sequences, train_batch, value_batch
from torch import Tensor

from roll_gspo.batch import TrainBatch
from roll_gspo.metrics import Metric, mean_of, to_floats
from roll_gspo.roles.sft_actor import SftActor
from roll_gspo.strategies.base import UpdateResult
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.micro_batches import MicroBatching

UpdateNumbers = list[tuple[float, float, float]]
OPTIMIZER = optimizer_setup(learning_rate=1e-3)


def trained(
    folder: Path,
    layout: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    batching: MicroBatching = MicroBatching(2),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Score, update three times and score again in a layout."""
    from roll_gspo.strategies.megatron.engine import MegatronTrain

    engine = MegatronTrain(model_setup(folder, dtype), OPTIMIZER, MegatronConfig(**layout))
    before = engine.score(sequences(), entropy=True)
    results = [engine.update(batching.split(train_batch(step)), policy_loss, True) for step in range(3)]
    after = engine.score(sequences(), entropy=True)
    return {
        "scores": [before.log_probs, before.entropy, after.log_probs, after.entropy],
        "updates": _update_numbers(results),
        "metrics": [to_floats(r.metrics) for r in results],
        "weights": {name: tensor.clone() for name, tensor in engine.weights()},
    }


def valued(folder: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Compute values before and after three updates of a critic in a layout."""
    from roll_gspo.strategies.megatron.engine import MegatronValue

    engine = MegatronValue(model_setup(folder), OPTIMIZER, MegatronConfig(**layout))
    results = [
        engine.update(
            value_batch(step).split(2),
            squared_error,
        )
        for step in range(3)
    ]
    return {"scores": [engine.values(sequences())], "updates": _update_numbers(results), "metrics": []}


def imitated(folder: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Score and update twice on conversations, whose masks have gaps."""
    from roll_gspo.strategies.megatron.engine import MegatronTrain

    engine = MegatronTrain(model_setup(folder), OPTIMIZER, MegatronConfig(**layout))
    batch = demonstrations()
    actor = SftActor(
        engine, mini_batch_size=len(batch), micro_batching=MicroBatching(2), max_consecutive_skipped_steps=1
    )
    metrics = [actor.update(batch, step, lambda done, total: None) for step in range(2)]
    return {"scores": [engine.score(batch.sequences).log_probs], "updates": [], "metrics": metrics}


def squared_error(values: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
    """Return the sum of squared errors of the returns."""
    mask = batch.response_mask
    assert batch.returns is not None
    error = torch.where(mask, values - batch.returns, 0.0) ** 2
    return error.sum(), {"error": mean_of(error.detach(), mask)}


def replayed(folder: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Record experts and update twice with them replayed."""
    from roll_gspo.strategies.megatron.engine import MegatronTrain

    setup = replace(model_setup(folder), replay_routing=True)
    engine = MegatronTrain(setup, OPTIMIZER, MegatronConfig(**layout))
    experts = engine.score(sequences()).routed_experts
    assert experts is not None
    results = [
        engine.update(replace(train_batch(1), routed_experts=experts).split(2), policy_loss, True) for _ in range(2)
    ]
    return {
        "scores": [experts],
        "updates": _update_numbers(results),
        "metrics": [to_floats(r.metrics) for r in results],
    }


def _update_numbers(results: list[UpdateResult]) -> UpdateNumbers:
    return [(r.loss, r.grad_norm, r.learning_rate) for r in results]
