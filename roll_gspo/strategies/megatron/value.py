"""A critic with megatron-core: the trunk of a checkpoint under a value head.

Legend: B samples, T response positions, N response tokens of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.config.strategy import MegatronConfig
from roll_gspo.metrics import Metric
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, UpdateResult, ValueLossFunction
from roll_gspo.strategies.device import move
from roll_gspo.strategies.log_probs import place
from roll_gspo.strategies.megatron.model import ResponseModel, build_model
from roll_gspo.strategies.megatron.trainer import MegatronTrainer
from roll_gspo.strategies.value_head import ValueHead, values_in_micro_batches


class MegatronValue:
    """`ValueStrategy` of a checkpoint; a `ValueHead` replaces the output layer.

    Raises:
        ConfigError: a layout or a model that is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: MegatronConfig) -> None:
        self._model = _with_value_head(build_model(model, strategy_config))
        self._trainer = MegatronTrainer(self._model, optimizer, strategy_config)

    @torch.no_grad()
    def values(self, sequences: Sequences) -> Tensor:
        """[B, T] float32 on the CPU, without gradient: expected return before each response token; 0 where masked."""
        self._model.wrapped.eval()

        def forward(part: Sequences) -> Tensor:
            part = move(part, self._model.device)
            return _values(self._model.logits(part), part)

        return values_in_micro_batches(sequences, self._model.setup.micro_batch_size, forward)

    def update(self, micro_batches: Sequence[TrainBatch], loss: ValueLossFunction) -> UpdateResult:
        """One optimizer step over all micro-batches; skipped where loss or gradient norm are not finite."""

        def share(output: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            return loss(_values(output, batch.sequences), batch)

        return self._trainer.update(micro_batches, lambda batch: self._model.logits(batch.sequences), share)

    def save(self, folder: Path) -> None:
        """Write `rank_000.pt`: parameters, value head, optimizer state, applied steps and RNG states."""
        self._trainer.save(folder)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote with the same layout.

        Raises:
            CheckpointError: there is none, or it is of another model.
        """
        self._trainer.load(folder)


class _OutputHead(ValueHead):
    """A value head under the signature of megatron's output layer, which also returns its bias."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Hidden states [N, 1, H] -> values [N, 1, 1] and no bias."""
        return super().forward(hidden), None


def _with_value_head(model: ResponseModel) -> ResponseModel:
    """The same trunk under a head, to be done before optimizer and data-parallel wrapper know the parameters."""
    gpt = model.gpt
    gpt.share_embeddings_and_output_weights = False  # a tied tensor is the embedding's alone from now on
    gpt.output_layer = _OutputHead(model.architecture.hidden_size).to(model.device)  # type: ignore[assignment]
    return dataclasses.replace(model)  # watches the new output layer


def _values(output: Tensor, sequences: Sequences) -> Tensor:
    """The head's [N, 1] at its places in [B, T]; 0 elsewhere."""
    return place(output[:, 0], sequences.response_mask)
