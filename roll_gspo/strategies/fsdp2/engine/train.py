"""Training a policy whose parameters are sharded over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.metrics import Metric
from roll_gspo.strategies.base import (
    LossFunction,
    ModelSetup,
    OptimizerSetup,
    TokenScores,
    UpdateResult,
    WeightSource,
)
from roll_gspo.strategies.fsdp2.config import Fsdp2Config
from roll_gspo.strategies.fsdp2.engine.model import build_sharded
from roll_gspo.strategies.fsdp2.engine.model_input import ModelInput
from roll_gspo.strategies.fsdp2.engine.scores import score, scores_of
from roll_gspo.strategies.fsdp2.engine.trainer import Fsdp2Trainer
from roll_gspo.strategies.fsdp2.engine.weights import ShardedWeights
from roll_gspo.strategies.gathering import write_by_first_rank
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.trainer_checkpoints import TrainerCheckpoints


class Fsdp2Train(TrainerCheckpoints[Fsdp2Trainer]):
    """`TrainStrategy` of a checkpoint.

    Args:
        model, optimizer, strategy_config: see `ModelSetup`, `OptimizerSetup`, `Fsdp2Config`.

    Raises:
        ConfigError: the model is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: Fsdp2Config) -> None:
        self._model = build_sharded(model, strategy_config, trained=True)
        self._trainer = Fsdp2Trainer(self._model, optimizer)
        self._state = self._trainer.state

    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample with the current weights, without gradient. The result is float32 on the CPU."""
        self._state.need(Residency.WEIGHTS, "score")
        return score(self._model, sequences, entropy)

    def update(self, micro_batches: Sequence[TrainBatch], loss: LossFunction, entropy: bool) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite."""
        self._state.need(Residency.FULL, "update")
        temperature = self._model.setup.temperature

        def share(logits: Tensor, given: ModelInput, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            return loss(scores_of(logits, given, temperature, entropy), batch)

        return self._trainer.update(micro_batches, share)

    def weights(self) -> WeightSource:
        """Return the live weights under checkpoint names, in the setup's dtype."""
        self._state.need(Residency.WEIGHTS, "export weights")
        return ShardedWeights(self._model.module, self._model.names, self._model.setup.dtype)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; config and tokenizer come from the source checkpoint.

        Every rank takes part in the export; rank 0 writes one shard after the other.

        Raises:
            CheckpointError: rank 0 could not write; raised on every rank.
        """
        write_by_first_rank(folder, self._model.setup, self.weights())
