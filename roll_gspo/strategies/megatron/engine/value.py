"""A critic with megatron-core: the trunk of a checkpoint under a value head.

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
from roll_gspo.strategies.trainer_checkpoints import TrainerCheckpoints
from roll_gspo.strategies.value_head import ValueHead


class MegatronValue(TrainerCheckpoints[MegatronTrainer]):
    """`ValueStrategy` of a checkpoint; a `ValueHead` replaces the output layer.

    Raises:
        ConfigError: a layout or a model that is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: MegatronConfig) -> None:
        self._model, self._head = _with_value_head(build_model(model, strategy_config))
        self._trainer = MegatronTrainer(self._model, optimizer)

    def values(self, sequences: Sequences) -> Tensor:
        """[B, T] float32 on the CPU, without gradient: expected return before each response token; 0 where masked."""

        def read(rows: Tensor, micro_batch: MicroBatch) -> list[Tensor]:
            return [self._values(rows, micro_batch.packed_layout)]

        return self._model.over_samples(sequences, read)[0]

    def update(self, micro_batches: Sequence[TrainBatch], loss: ValueLossFunction) -> UpdateResult:
        """One optimizer step over all micro-batches; skipped where loss or gradient norm are not finite."""

        def share(rows: Tensor, packed_layout: PackedLayout, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            return loss(self._values(rows, packed_layout), batch)

        return self._trainer.update(micro_batches, share)

    def _values(self, rows: Tensor, packed_layout: PackedLayout) -> Tensor:
        """[B, T] of hidden states [N, H]."""
        assert self._head is not None  # rows are there on the last pipeline stage only
        # the layer's own forward hands out the rows, see ResponseModel
        return packed_layout.place(ValueHead.forward(self._head, rows)[:, 0])


def _with_value_head(model: ResponseModel) -> tuple[ResponseModel, ValueHead | None]:
    """The same trunk under a head, to be done before optimizer and data-parallel wrapper know the parameters.

    The head is that of the last pipeline stage; each tensor-parallel rank has the whole of it.
    """
    head = None
    for chunk in model.chunks:
        chunk.share_embeddings_and_output_weights = False  # a tied tensor is the embedding's alone from now on
        if chunk.post_process:
            head = ValueHead(model.architecture.hidden_size).to(model.device)
            chunk.output_layer = head  # type: ignore[assignment]
    return dataclasses.replace(model, partial_head=False), head
