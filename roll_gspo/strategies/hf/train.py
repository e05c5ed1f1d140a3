"""Training a policy with plain transformers and torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
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
from roll_gspo.strategies.lora import ADAPTER_FOLDER, Adapter, AdapterWeights
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.trainer_checkpoints import TrainerCheckpoints
from roll_gspo.strategies.transformers_model import compute_logits_in_float32, recompute_layers


class HfTrain(TrainerCheckpoints[HfTrainer]):
    """`TrainStrategy` of a checkpoint, on one device.

    Trained parameters are float32. With `dtype` bfloat16 the passes run under autocast and exported weights are
    bfloat16. A frozen model, which has an adapter, is held in `dtype`.

    Raises:
        ConfigError: the checkpoint cannot be loaded, or the dtype is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: HfConfig) -> None:
        self._setup = model
        self._device = local_device()
        lora, own = model.lora, torch.float32 if model.lora is None else model.dtype
        self._model = load_model(model.checkpoint, own, strategy_config.attn_implementation)
        self._adapter = None if lora is None else Adapter(self._model, lora, model.seed)
        if self._adapter is not None:
            self._adapter.initialize()
        if strategy_config.gradient_checkpointing:
            recompute_layers(self._model, is_random=lora is not None and lora.dropout > 0)
        if uses_float32(model.dtype, strategy_config.fp32_lm_head):
            compute_logits_in_float32(self._model, model.dtype)
        self._trainer = HfTrainer(self._model, optimizer, model.dtype, lora)
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

    @torch.no_grad()
    def score_base(self, sequences: Sequences) -> TokenScores:
        """Score every sample with the frozen model, without gradient and entropy."""
        with self._trained_adapter().off():
            return self.score(sequences)

    def _trained_adapter(self) -> Adapter:
        if self._adapter is None:
            raise RuntimeError("HfTrain: there is no adapter (ModelSetup.lora is None)")
        return self._adapter

    def update(self, micro_batches: Sequence[TrainBatch], loss: LossFunction, entropy: bool) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite."""
        self._state.need(Residency.FULL, "update")
        dropout = nullcontext() if self._adapter is None else self._adapter.dropout(self._trainer.applied_steps)
        with dropout:
            return self._trainer.update(
                micro_batches, lambda batch: loss(self._forward(batch.sequences, entropy), batch)
            )

    def weights(self) -> WeightSource:
        """Return the live weights in the setup's dtype: under checkpoint names, or the adapter under those of `peft`.

        `ModelSetup.lora.sync` decides.
        """
        if self._adapter is None or self._adapter.setup.sync == "merged":
            return self._whole_model()
        self._state.need(Residency.WEIGHTS, "export weights")
        return AdapterWeights(self._adapter, self._setup.dtype)

    def _whole_model(self) -> HfWeights:
        self._state.need(Residency.WEIGHTS, "export weights")
        return HfWeights(self._model, self._setup.dtype, self._adapter)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; config and tokenizer come from the source checkpoint.

        An adapter is merged into the weights, and written into the folder `adapter`, too.
        """
        write_checkpoint(folder, self._setup.checkpoint, self._whole_model(), self._setup.dtype)
        if self._adapter is not None:
            (folder / ADAPTER_FOLDER).mkdir()
            self.save_adapter(folder / ADAPTER_FOLDER)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in the layout of `peft`, in float32."""
        self._state.need(Residency.WEIGHTS, "export the adapter")
        self._trained_adapter().save(folder, self._setup.checkpoint, torch.float32)
