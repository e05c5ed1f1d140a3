"""A critic with megatron-core: the trunk of a checkpoint and a value head.

Legend: B samples, T response positions, N response tokens of a micro-batch, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.metrics import Metric
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, UpdateResult, ValueLossFunction
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.engine.model import MicroBatch, ResponseModel, build_model
from roll_gspo.strategies.megatron.engine.packed_layout import PackedLayout
from roll_gspo.strategies.megatron.engine.trainer import MegatronTrainer
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.trainer_checkpoints import TrainerCheckpoints
from roll_gspo.strategies.value_head import ValueHead


class MegatronValue(TrainerCheckpoints[MegatronTrainer]):
    """`ValueStrategy` of a checkpoint; a `ValueHead` replaces the output layer.

    Raises:
        ConfigError: the layout or the model is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: MegatronConfig) -> None:
        self._model, self._head = _with_value_head(build_model(model, strategy_config))
        self._trainer = MegatronTrainer(self._model, optimizer)
        self._state = self._trainer.state

    def values(self, sequences: Sequences) -> Tensor:
        """Return [B, T] float32 on the CPU, without gradient; 0 where masked."""
        self._state.need(Residency.WEIGHTS, "compute values")

        def read(rows: Tensor, micro_batch: MicroBatch) -> list[Tensor]:
            return [self._values(rows, micro_batch.packed_layout)]

        self._trainer.finish_gather()
        return self._model.over_samples(sequences, read)[0]

    def update(self, micro_batches: Sequence[TrainBatch], loss: ValueLossFunction) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite."""
        self._state.need(Residency.FULL, "update")

        def share(rows: Tensor, packed_layout: PackedLayout, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            return loss(self._values(rows, packed_layout), batch)

        return self._trainer.update(micro_batches, share)

    def _values(self, rows: Tensor, packed_layout: PackedLayout) -> Tensor:
        """Return [B, T] values of hidden states [N, H]."""
        assert self._head is not None  # only the last pipeline stage has the rows
        # the layer's forward returns the rows, see ResponseModel
        return packed_layout.place(ValueHead.forward(self._head, rows)[:, 0])


def _with_value_head(model: ResponseModel) -> tuple[ResponseModel, ValueHead | None]:
    """Replace the head before optimizer and data-parallel wrapper collect the parameters.

    The last pipeline stage has the head; each tensor-parallel rank has a whole copy.
    """
    head = None
    for chunk in model.chunks:
        chunk.share_embeddings_and_output_weights = False  # a tied tensor belongs only to the embedding from now on
        if chunk.post_process:
            head = ValueHead(model.architecture.hidden_size).to(model.device)
            chunk.output_layer = head  # type: ignore[assignment]
    return dataclasses.replace(model, partial_head=False), head
