"""A critic whose parameters are sharded over the ranks: the trunk of a checkpoint and a value head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.metrics import Metric
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, UpdateResult, ValueLossFunction
from roll_gspo.strategies.fsdp2.config import Fsdp2Config
from roll_gspo.strategies.fsdp2.engine.model import build_sharded
from roll_gspo.strategies.fsdp2.engine.model_input import ModelInput
from roll_gspo.strategies.fsdp2.engine.trainer import Fsdp2Trainer
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.trainer_checkpoints import TrainerCheckpoints


class Fsdp2Value(TrainerCheckpoints[Fsdp2Trainer]):
    """`ValueStrategy` of a checkpoint; a `ValueHead` replaces the output layer.

    Raises:
        ConfigError: the model is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: Fsdp2Config) -> None:
        self._model = build_sharded(model, strategy_config, trained=True, value_head=True)
        self._trainer = Fsdp2Trainer(self._model, optimizer)
        self._state = self._trainer.state

    def values(self, sequences: Sequences) -> Tensor:
        """Return [B, T] float32 on the CPU, without gradient; 0 where masked."""
        self._state.need(Residency.WEIGHTS, "compute values")
        return self._model.over_samples(sequences, lambda values, given: [given.place(values[:, 0])])[0]

    def update(self, micro_batches: Sequence[TrainBatch], loss: ValueLossFunction) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite."""
        self._state.need(Residency.FULL, "update")

        def share(values: Tensor, given: ModelInput, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            return loss(given.place(values[:, 0]), batch)

        return self._trainer.update(micro_batches, share)
