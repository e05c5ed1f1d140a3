"""A critic with plain transformers: the trunk of a checkpoint and a value head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, UpdateResult, ValueLossFunction
from roll_gspo.strategies.device import local_device, move
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.model import load_model
from roll_gspo.strategies.hf.trainer import HfTrainer
from roll_gspo.strategies.log_probs import place
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.trainer_checkpoints import TrainerCheckpoints
from roll_gspo.strategies.transformers_model import predicting_rows, recompute_layers
from roll_gspo.strategies.value_head import ValueHead, values_in_micro_batches


class HfValue(TrainerCheckpoints[HfTrainer]):
    """`ValueStrategy` of a checkpoint, on one device; a `ValueHead` replaces the output layer.

    If input and output embeddings are tied, the input keeps the tensor.

    Raises:
        ConfigError: the checkpoint cannot be loaded, or the dtype is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: HfConfig) -> None:
        self._setup = model
        self._device = local_device()
        self._model = load_model(model.checkpoint, torch.float32, strategy_config.attn_implementation)
        if strategy_config.gradient_checkpointing:
            recompute_layers(self._model)
        self._head = ValueHead(self._model.config.get_text_config().hidden_size).to(self._device)
        self._model.config.tie_word_embeddings = False
        self._model.set_output_embeddings(self._head)
        self._trainer = HfTrainer(self._model, optimizer, model.dtype)
        self._state = self._trainer.state("hf_train")

    def _forward(self, sequences: Sequences) -> Tensor:
        """Return [B, T] values of the states before the response tokens; differentiable."""
        with self._trainer.precision():
            # the body only: the processing of logits (e.g. capping) does not apply to values
            hidden = self._model.base_model(input_ids=sequences.input_ids, use_cache=False).last_hidden_state
        places, positions = predicting_rows(sequences)
        values = self._head(hidden[places[0], positions])[:, 0]
        return place(values, places, tuple(sequences.response_mask.shape))

    @torch.no_grad()
    def values(self, sequences: Sequences) -> Tensor:
        """Return [B, T] float32 on the CPU, without gradient; 0 where masked."""
        self._state.need(Residency.WEIGHTS, "compute values")
        return values_in_micro_batches(
            sequences, self._setup.micro_batch_size, lambda part: self._forward(move(part, self._device))
        )

    def update(self, micro_batches: Sequence[TrainBatch], loss: ValueLossFunction) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite."""
        self._state.need(Residency.FULL, "update")
        return self._trainer.update(micro_batches, lambda batch: loss(self._forward(batch.sequences), batch))
