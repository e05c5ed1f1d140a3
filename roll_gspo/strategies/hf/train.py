"""Training a policy with plain transformers and torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.models.hf_checkpoint import write_checkpoint
from roll_gspo.strategies.base import (
    LossFunction,
    ModelSetup,
    OptimizerSetup,
    TokenScores,
    UpdateResult,
    WeightSource,
)
from roll_gspo.strategies.device import local_device, move
from roll_gspo.strategies.head_products import uses_float32
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.model import HfWeights, load_model, response_scores
from roll_gspo.strategies.hf.trainer import HfTrainer
from roll_gspo.strategies.log_probs import score_in_micro_batches
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.trainer_checkpoints import TrainerCheckpoints
from roll_gspo.strategies.transformers_model import compute_logits_in_float32, recompute_layers


class HfTrain(TrainerCheckpoints[HfTrainer]):
    """`TrainStrategy` of a checkpoint, on one device.

    Parameters are float32. With `dtype` bfloat16 the passes run under autocast and exported weights are bfloat16.

    Raises:
        ConfigError: the checkpoint cannot be loaded, or the dtype is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: HfConfig) -> None:
        self._setup = model
        self._device = local_device()
        self._model = load_model(model.checkpoint, torch.float32, strategy_config.attn_implementation)
        if strategy_config.gradient_checkpointing:
            recompute_layers(self._model)
        if uses_float32(model.dtype, strategy_config.fp32_lm_head):
            compute_logits_in_float32(self._model, model.dtype)
        self._trainer = HfTrainer(self._model, optimizer, model.dtype)
        self._state = self._trainer.state("hf_train")

    def _forward(self, sequences: Sequences, entropy: bool) -> TokenScores:
        with self._trainer.precision():
            return response_scores(self._model, sequences, self._setup.temperature, entropy)

    @torch.no_grad()
    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample with the current weights, without gradient. The result is float32 on the CPU."""
        self._state.need(Residency.WEIGHTS, "score")
        return score_in_micro_batches(
            sequences, self._setup.micro_batch_size, lambda part: self._forward(move(part, self._device), entropy)
        )

    def update(self, micro_batches: Sequence[TrainBatch], loss: LossFunction, entropy: bool) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite."""
        self._state.need(Residency.FULL, "update")
        return self._trainer.update(micro_batches, lambda batch: loss(self._forward(batch.sequences, entropy), batch))

    def weights(self) -> WeightSource:
        """Return the live weights under checkpoint names, in the setup's dtype."""
        self._state.need(Residency.WEIGHTS, "export weights")
        return HfWeights(self._model, self._setup.dtype)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; config and tokenizer come from the source checkpoint."""
        write_checkpoint(folder, self._setup.checkpoint, self.weights(), self._setup.dtype)
