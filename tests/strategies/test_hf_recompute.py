"""`gradient_checkpointing` of the transformers engine: the same numbers, with two forward passes per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import (
    Checkpoints,
    model_setup,
    optimizer_setup,
    policy_loss,
    train_batch,
    value_batch,
    value_weights,
    weights_of,
    with_random_head,
)
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from roll_gspo.batch import TrainBatch
from roll_gspo.errors import ConfigError
from roll_gspo.metrics import Metric
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.hf.value import HfValue
from roll_gspo.strategies.transformers_model import recompute_layers

CONFIGS = (HfConfig(), HfConfig(gradient_checkpointing=True))


def attentions(model: nn.Module) -> list[int]:
    """Count the forward passes of the attention blocks of `model` from now on; the list has one entry per pass."""
    calls: list[int] = []
    blocks = [layer.self_attn for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_moe"])
def test_gradients_and_weights_are_bitwise_equal(checkpoint: Checkpoints, family: str, dtype: torch.dtype) -> None:
    found: list[tuple[Any, ...]] = []
    for config in CONFIGS:
        engine = HfTrain(model_setup(checkpoint(family), dtype), optimizer_setup(), config)
        calls = attentions(engine._model)
        results = [engine.update([train_batch(seed), train_batch(seed + 1)], policy_loss, True) for seed in (1, 3)]
        layers = engine._model.config.num_hidden_layers
        assert len(calls) == 4 * layers * (2 if config.gradient_checkpointing else 1)
        calls.clear()
        scores = engine.score(train_batch().sequences).log_probs
        assert len(calls) == 2 * layers, "nothing is computed twice without a gradient"
        norms = [(r.loss, r.grad_norm) for r in results]
        found.append((norms, scores, weights_of(engine)))
    (norms, scores, weights), (norms_again, scores_again, weights_again) = found
    assert norms == norms_again and scores.equal(scores_again)
    assert all(tensor.equal(weights_again[name]) for name, tensor in weights.items())


def test_critics_are_equal(checkpoint: Checkpoints) -> None:
    def loss(values: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
        mask = batch.response_mask
        return torch.where(mask, (values - batch.returns) ** 2, 0.0).sum(), {}

    trained = []
    for config in CONFIGS:
        engine = with_random_head(HfValue(model_setup(checkpoint("qwen3_tied")), optimizer_setup(), config))
        assert engine.update([value_batch()], loss).applied
        trained.append({name: tensor.clone() for name, tensor in value_weights(engine).items()})
    assert all(tensor.equal(trained[1][name]) for name, tensor in trained[0].items())


def test_model_without_marked_layers_is_refused(checkpoint: Checkpoints) -> None:
    engine = HfTrain(model_setup(checkpoint("qwen3_tied")), optimizer_setup(), HfConfig())
    engine._model.model.layers = nn.ModuleList()
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: .*model_type 'qwen3'; set it to false"):
        recompute_layers(engine._model)
