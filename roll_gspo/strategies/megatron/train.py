"""Training with megatron-core: its data-parallel wrapper, schedule and optimizer around one GPTModel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.config.strategy import MegatronConfig
from roll_gspo.metrics import Metric, merge
from roll_gspo.models.hf_checkpoint import write_checkpoint
from roll_gspo.strategies.base import (
    LossFunction,
    ModelSetup,
    OptimizerSetup,
    TokenScores,
    UpdateResult,
    WeightSource,
)
from roll_gspo.strategies.megatron.model import build_model
from roll_gspo.strategies.megatron.state import load_state, save_state
from roll_gspo.strategies.megatron.weights import MegatronWeights
from roll_gspo.strategies.schedule import learning_rate

# what the loss function of one micro-batch reports through megatron's schedule
_Report = tuple[Tensor, dict[str, Metric]]


class MegatronTrain:
    """`TrainStrategy` of a checkpoint.

    AdamW with decoupled weight decay, none on biases and norms. The learning rate comes from `strategies.schedule`,
    set on the parameter groups before each step, so that every engine follows one formula.

    Raises:
        ConfigError: a layout or a model that is not supported.
    """

    def __init__(self, model: ModelSetup, optimizer: OptimizerSetup, strategy_config: MegatronConfig) -> None:
        self._setup = optimizer
        self._model = build_model(model, strategy_config)
        self._ddp = self._wrap(strategy_config)
        self._model.wrapped = self._ddp
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optimizer.learning_rate,
                min_lr=0.0,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.betas[0],
                adam_beta2=optimizer.betas[1],
                adam_eps=optimizer.epsilon,
                clip_grad=optimizer.max_grad_norm,
                bf16=model.dtype == torch.bfloat16,
                params_dtype=model.dtype,
                use_distributed_optimizer=strategy_config.use_distributed_optimizer,
            ),
            [self._ddp],
        )
        self._applied_steps = 0

    def _wrap(self, config: MegatronConfig) -> DistributedDataParallel:
        """The data-parallel wrapper, with gradients accumulated in float32 and summed as they are."""
        gpt = self._model.gpt
        ddp = DistributedDataParallel(
            gpt.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=config.overlap_grad_reduce,
                use_distributed_optimizer=config.use_distributed_optimizer,
            ),
            gpt,
        )
        gpt.config.finalize_model_grads_func = _finalize_sums
        if config.overlap_grad_reduce:
            gpt.config.no_sync_func = ddp.no_sync
        return ddp

    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample with the current weights, without gradient; float32 on the CPU."""
        return self._model.score(sequences, entropy)

    def update(self, micro_batches: Sequence[TrainBatch], loss: LossFunction, entropy: bool) -> UpdateResult:
        """One optimizer step over all micro-batches; skipped where loss or gradient norm are not finite."""
        if not micro_batches:
            raise ValueError("update: no micro-batches")
        self._ddp.train()
        self._clear_gradients()
        reports: list[_Report] = get_forward_backward_func()(
            forward_step_func=functools.partial(self._forward_step, loss=loss, entropy=entropy),
            data_iterator=iter(micro_batches),
            model=[self._ddp],
            num_microbatches=len(micro_batches),
            seq_length=max(batch.sequences.input_ids.shape[1] for batch in micro_batches),
            micro_batch_size=max(len(batch) for batch in micro_batches),
        )
        losses = [float(value) for value, _ in reports]
        rate = learning_rate(self._setup, self._applied_steps)
        grad_norm, applied = self._step(rate, all(math.isfinite(value) for value in losses))
        metrics = merge(metrics for _, metrics in reports)
        return UpdateResult(sum(losses), grad_norm, rate, applied, metrics)

    def _forward_step(
        self, batches: Iterator[TrainBatch], _: torch.nn.Module, loss: LossFunction, entropy: bool
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, _Report]]]:
        """megatron's forward step: the logits, and how a loss is made of them."""
        batch = next(batches).to(self._model.device)

        def share_of_loss(logits: Tensor) -> tuple[Tensor, Tensor, _Report]:
            value, metrics = loss(self._model.scores(logits, batch.sequences, entropy), batch)
            no_tokens = torch.zeros((), dtype=torch.int, device=value.device)
            return value, no_tokens, (value.detach().clone(), metrics)

        return self._model.logits(batch.sequences), share_of_loss

    def _step(self, rate: float, losses_finite: bool) -> tuple[float, bool]:
        """(gradient norm before clipping, whether the optimizer stepped); gradients are gone afterwards."""
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        applied = losses_finite and math.isfinite(grad_norm)
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
                group["weight_decay"] = self._setup.weight_decay * group["wd_mult"]
            self._optimizer.step()
            self._applied_steps += 1
        self._clear_gradients()
        return grad_norm, applied

    def _clear_gradients(self) -> None:
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    def weights(self) -> WeightSource:
        """The live weights under checkpoint names."""
        return MegatronWeights(self._model.gpt, self._model.architecture)

    def save(self, folder: Path) -> None:
        """Write `rank_000.pt`: parameters, optimizer state, applied steps and RNG states."""
        save_state(folder, self._model.gpt, self._optimizer, self._applied_steps)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote with the same layout.

        Raises:
            CheckpointError: there is none, or it is of another model.
        """
        self._applied_steps = load_state(folder, self._model.gpt, self._optimizer)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout; config and tokenizer come from the source checkpoint."""
        setup = self._model.setup
        write_checkpoint(folder, setup.checkpoint, self.weights(), setup.dtype)


def _finalize_sums(model: list[Any], _num_tokens: Tensor | None, **groups: Any) -> None:
    """Reduce gradients as sums: no division by tokens, micro-batches or data-parallel ranks."""
    finalize_model_grads(model, None, **groups)
