"""Batches, setups and a policy-gradient-like loss for the tests of every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import VOCAB
from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.metrics import Metric, mean_of
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, TokenScores, TrainStrategy, ValueStrategy
from roll_gspo.strategies.fsdp2.engine.value import Fsdp2Value
from roll_gspo.strategies.hf.model import HfWeights
from roll_gspo.strategies.hf.value import HfValue

Checkpoints = Callable[[str], Path]

VALUE_HEAD = "lm_head.weight"
PROMPT_LENGTHS = (3, 7, 1, 12, 5, 4)
RESPONSE_LENGTHS = (9, 4, 15, 0, 2, 11)


def model_setup(folder: Path, dtype: torch.dtype = torch.float32, micro_batch_size: int = 4) -> ModelSetup:
    return ModelSetup(folder, dtype, micro_batch_size, temperature=0.7, seed=0)


def optimizer_setup(**changes: object) -> OptimizerSetup:
    values = {
        "learning_rate": 1e-2,
        "total_steps": 10,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "epsilon": 1e-6,
    }
    return OptimizerSetup(**{**values, **changes})  # type: ignore[arg-type]


def sequences(seed: int = 1) -> Sequences:
    """Return six samples of different lengths, one with an empty response."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return Sequences.collate([tokens(n) for n in PROMPT_LENGTHS], [tokens(n) for n in RESPONSE_LENGTHS], pad=0)


def train_batch(seed: int = 1) -> TrainBatch:
    """Return six samples with NaN at masked positions, which a wrong read would spread."""
    tokens = sequences(seed)
    mask = tokens.response_mask
    generator = torch.Generator().manual_seed(seed)

    def values() -> Tensor:
        return torch.randn(mask.shape, generator=generator).masked_fill(~mask, torch.nan)

    return TrainBatch(tokens, torch.arange(len(tokens)), values(), values(), values())


def value_batch(seed: int = 1) -> TrainBatch:
    """Return `train_batch` with returns near 1 and earlier values near them; NaN where masked."""
    batch = train_batch(seed)
    return replace(batch, returns=1 + batch.advantages, values=1 + batch.advantages + 0.5 * batch.old_log_probs)


def policy_loss(scores: TokenScores, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
    """Return advantage-weighted log-probs minus an entropy bonus, divided by a global token count."""
    mask = batch.response_mask
    gain = torch.where(mask, scores.log_probs * batch.advantages, 0.0).sum()
    assert scores.entropy is not None
    loss = -(gain + 0.1 * scores.entropy.sum()) / sum(RESPONSE_LENGTHS)
    return loss, {"entropy": mean_of(scores.entropy.detach(), mask)}


def value_weights(engine: ValueStrategy) -> dict[str, Tensor]:
    """Return the current weights of a critic under checkpoint names; its head replaces the output layer."""
    if isinstance(engine, HfValue):
        return dict(HfWeights(engine._model))
    if isinstance(engine, Fsdp2Value):
        return {name: parameter.detach().full_tensor() for name, parameter in engine._model.module.named_parameters()}
    from roll_gspo.strategies.megatron.engine.weights import MegatronWeights

    model = engine._model  # type: ignore[attr-defined]
    untied = replace(model.architecture, tie_word_embeddings=False)  # the value head is not tied
    return dict(MegatronWeights(model.chunks, untied))


def with_random_head(engine: ValueStrategy) -> ValueStrategy:
    """Set the same value head on every engine, so that the trunk has a gradient from the first step."""
    head = value_weights(engine)[VALUE_HEAD]
    head.copy_(0.1 * torch.randn(head.shape, generator=torch.Generator().manual_seed(5)))
    return engine


def weights_of(engine: TrainStrategy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights()}


def demonstrations(seed: int = 1) -> TrainBatch:
    """Return six conversations; those with several turns have gaps in their masks."""
    tokens = sequences(seed)
    mask = tokens.response_mask.clone()
    mask[0, 2:5] = mask[2, 1:3] = mask[2, 9:12] = False
    mask[5, 0] = False
    given = Sequences(tokens.input_ids, tokens.prompt_lengths, mask)
    return TrainBatch.of_demonstrations(given, torch.arange(len(given)))
