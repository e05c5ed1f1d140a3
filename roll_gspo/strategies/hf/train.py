"""Training with plain transformers and torch's AdamW: every step of an update, to be read in one go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.config.strategy import HfConfig
from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.metrics import merge
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
from roll_gspo.strategies.hf.model import HfWeights, load_model, response_scores
from roll_gspo.strategies.log_probs import score_in_micro_batches
from roll_gspo.strategies.schedule import learning_rate

_STATE_FILE = "hf_train.pt"


class HfTrain:
    """`TrainStrategy` of a checkpoint, on one device.

    Parameters, gradients and moments are float32; with `dtype` bfloat16 the passes run under autocast and exported
    weights are bfloat16. Weight decay is decoupled and leaves biases and norms alone.

    Raises:
        ConfigError: the checkpoint cannot be loaded, or a dtype that is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: HfConfig) -> None:
        if model.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"hf_train: dtype {model.dtype} is not supported; use float32 or bfloat16")
        self._model_setup = model
        self._setup = optimizer
        self._device = local_device()
        self._model = load_model(model.checkpoint, torch.float32, strategy_config.attn_implementation)
        parameters = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optimizer.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
        )
        self._applied_steps = 0

    def _precision(self) -> AbstractContextManager[Any]:
        if self._model_setup.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._model_setup.dtype)

    def _forward(self, sequences: Sequences, entropy: bool) -> TokenScores:
        with self._precision():
            return response_scores(self._model, sequences, self._model_setup.temperature, entropy)

    @torch.no_grad()
    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample with the current weights, without gradient; float32 on the CPU."""
        return score_in_micro_batches(
            sequences,
            self._model_setup.micro_batch_size,
            lambda part: self._forward(move(part, self._device), entropy),
        )

    def update(self, micro_batches: Sequence[TrainBatch], loss: LossFunction, entropy: bool) -> UpdateResult:
        """One optimizer step over all micro-batches; skipped where loss or gradient norm are not finite."""
        if not micro_batches:
            raise ValueError("update: no micro-batches")
        self._optimizer.zero_grad()
        losses, metrics = [], []
        for batch in micro_batches:
            batch = batch.to(self._device)
            share, figures = loss(self._forward(batch.sequences, entropy), batch)
            share.backward()
            losses.append(share.item())
            metrics.append(figures)
        max_norm = self._setup.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), max_norm).item()
        rate = learning_rate(self._setup, self._applied_steps)
        applied = math.isfinite(grad_norm) and all(map(math.isfinite, losses))
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
            self._applied_steps += 1
        self._optimizer.zero_grad()
        return UpdateResult(sum(losses), grad_norm, rate, applied, merge(metrics))

    def weights(self) -> WeightSource:
        """The live weights under checkpoint names, in the setup's dtype."""
        return HfWeights(self._model, self._model_setup.dtype)

    def save(self, folder: Path) -> None:
        """Write parameters, optimizer state, applied steps and RNG states into one file."""
        state = {
            "parameters": dict(self._model.named_parameters()),
            "optimizer": self._optimizer.state_dict(),
            "applied_steps": self._applied_steps,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        torch.save(state, folder / _STATE_FILE)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote.

        Raises:
            CheckpointError: there is none, or it is of another model.
        """
        path = folder / _STATE_FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; the checkpoint is of another strategy or incomplete")
        state = torch.load(path, map_location="cpu", weights_only=True)
        parameters = dict(self._model.named_parameters())
        if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in state["parameters"].items()}:
            raise CheckpointError(f"{path}: parameters of another model; use the configuration that wrote it")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._applied_steps = state["applied_steps"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; config and tokenizer come from the source checkpoint."""
        write_checkpoint(folder, self._model_setup.checkpoint, self.weights(), self._model_setup.dtype)
