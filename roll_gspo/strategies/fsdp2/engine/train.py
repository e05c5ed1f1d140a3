"""Training a policy whose parameters are sharded over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
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
from roll_gspo.strategies.fsdp2.engine.weights import ShardedWeights, whole
from roll_gspo.strategies.gathering import fails_on_every_rank, write_by_first_rank
from roll_gspo.strategies.lora import ADAPTER_FOLDER, Adapter, AdapterWeights
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

    def score_base(self, sequences: Sequences) -> TokenScores:
        """Score every sample with the frozen model, without gradient and entropy."""
        with self._trained_adapter().off():
            return self.score(sequences)

    def _trained_adapter(self) -> Adapter:
        if self._model.adapter is None:
            raise RuntimeError("Fsdp2Train: there is no adapter (ModelSetup.lora is None)")
        return self._model.adapter

    def update(self, micro_batches: Sequence[TrainBatch], loss: LossFunction, entropy: bool) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite."""
        self._state.need(Residency.FULL, "update")

        def share(outputs: Tensor, given: ModelInput, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            return loss(scores_of(self._model, outputs, given, entropy), batch)

        adapter = self._model.adapter
        with nullcontext() if adapter is None else adapter.dropout(self._trainer.applied_steps, dist.get_rank()):
            return self._trainer.update(micro_batches, share)

    def weights(self) -> WeightSource:
        """Return the live weights in the setup's dtype: under checkpoint names, or the adapter under those of `peft`.

        `ModelSetup.lora.sync` decides.
        """
        adapter = self._model.adapter
        if adapter is None or adapter.setup.sync == "merged":
            return self._whole_model()
        self._state.need(Residency.WEIGHTS, "export weights")
        return AdapterWeights(adapter, self._model.setup.dtype, whole)

    def _whole_model(self) -> ShardedWeights:
        self._state.need(Residency.WEIGHTS, "export weights")
        return ShardedWeights(self._model.module, self._model.names, self._model.setup.dtype, self._model.adapter)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; config and tokenizer come from the source checkpoint.

        An adapter is merged into the weights, and written into the folder `adapter`, too. Every rank takes part in the
        export; rank 0 writes one shard after the other.

        Raises:
            CheckpointError: rank 0 could not write; raised on every rank.
        """
        write_by_first_rank(folder, self._model.setup, self._whole_model())
        if self._model.adapter is not None:
            if dist.get_rank() == 0:
                (folder / ADAPTER_FOLDER).mkdir()
            self.save_adapter(folder / ADAPTER_FOLDER)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in the layout of `peft`, in float32. Every rank takes part; rank 0 writes.

        Raises:
            CheckpointError: rank 0 could not write; raised on every rank.
        """
        self._state.need(Residency.WEIGHTS, "export the adapter")
        checkpoint, is_first = self._model.setup.checkpoint, dist.get_rank() == 0
        with fails_on_every_rank():
            self._trained_adapter().save(folder, checkpoint, torch.float32, whole, write=is_first)
