"""megatron's data-parallel wrapper, schedule and optimizer for a GPTModel with any head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from roll_gspo.batch import TrainBatch
from roll_gspo.metrics import Metric, merge
from roll_gspo.strategies.base import OptimizerSetup, UpdateResult
from roll_gspo.strategies.gathering import gather_reports
from roll_gspo.strategies.megatron.engine.gradients import clip_gradients, gradient_norm
from roll_gspo.strategies.megatron.engine.model import MicroBatch, ResponseModel
from roll_gspo.strategies.megatron.engine.offload import trainer_state
from roll_gspo.strategies.megatron.engine.packed_layout import PackedLayout
from roll_gspo.strategies.megatron.engine.state import begin_save, load_state
from roll_gspo.strategies.reports import Report
from roll_gspo.strategies.schedule import learning_rate
from roll_gspo.strategies.sharded_state import SavesShards

# (hidden states [N, H] that predict response tokens, how the micro-batch lies, the micro-batch) -> (its share of the
# loss, metrics)
Loss = Callable[[Tensor, PackedLayout, TrainBatch], tuple[Tensor, dict[str, Metric]]]


class MegatronTrainer(SavesShards):
    """AdamW with decoupled weight decay (none on biases and norms) and its schedule.

    The learning rate comes from `strategies.schedule` and is set on the parameter groups before each step, so that all
    engines use one formula.

    Args:
        model: trained model; it runs inside the data-parallel wrapper from now on.
        setup: settings of optimizer and schedule.

    Attributes:
        state: the state that leaves the device between phases.
    """

    def __init__(self, model: ResponseModel, setup: OptimizerSetup) -> None:
        self._setup = setup
        self._model = model
        self._ddp = _wrap(model)
        model.wrapped = list(self._ddp)
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=setup.learning_rate,
                min_lr=0.0,
                weight_decay=setup.weight_decay,
                adam_beta1=setup.betas[0],
                adam_beta2=setup.betas[1],
                adam_eps=setup.epsilon,
                clip_grad=setup.max_grad_norm,
                bf16=model.setup.dtype == torch.bfloat16,
                params_dtype=model.setup.dtype,
                use_distributed_optimizer=model.config.use_distributed_optimizer,
                overlap_param_gather=model.config.overlap_param_gather,
            ),
            list[MegatronModule](self._ddp),
        )
        self.state = trainer_state(model.chunks, self._ddp, self._optimizer, self.finish_gather)
        self._applied_steps = 0
        self._gathering = False

    def update(
        self,
        micro_batches: Sequence[TrainBatch],
        loss: Loss,
        before_pass: Callable[[TrainBatch | None], None] | None = None,
    ) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite.

        Args:
            micro_batches: micro-batches of all data-parallel ranks; each rank takes its share.
            loss: loss function of a micro-batch.
            before_pass: called with each micro-batch (None for a dummy pass) before its pass.
        """
        if not micro_batches:
            raise ValueError("update: no micro-batches")
        for ddp in self._ddp:
            ddp.train()
        self._clear_gradients()
        reports = self._model.run(self._mine(micro_batches), _reader(loss), train=True, before_pass=before_pass)
        reports_of_all = gather_reports(reports if self._model.is_output_rank else [])
        total = sum(value for value, _ in reports_of_all)
        rate = learning_rate(self._setup, self._applied_steps)
        grad_norm, applied = self._step(rate, math.isfinite(total))
        self._gathering = self._model.config.overlap_param_gather
        return UpdateResult(total, grad_norm, rate, applied, merge(metrics for _, metrics in reports_of_all))

    def _mine(self, micro_batches: Sequence[TrainBatch]) -> list[MicroBatch]:
        """Return this rank's micro-batches on its device."""
        nothing = micro_batches[0].sequences.rows(torch.zeros(1, dtype=torch.int64))
        return [
            self._model.micro_batch(nothing if batch is None else batch.sequences, batch)
            for batch in self._model.share(micro_batches, lambda batch: (batch.sequences, None))
        ]

    def _step(self, rate: float, losses_finite: bool) -> tuple[float, bool]:
        """Step the optimizer and drop the gradients; return (gradient norm before clipping, whether it stepped)."""
        self._optimizer.prepare_grads()
        grad_norm = gradient_norm(self._optimizer)
        applied = losses_finite and math.isfinite(grad_norm)
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
                group["weight_decay"] = self._setup.weight_decay * group["wd_mult"]
            clip_gradients(self._optimizer, grad_norm)
            self._optimizer.step_with_ready_grads()  # `step` would prepare gradients and compute their norm again
            self._applied_steps += 1
        self._clear_gradients()
        return grad_norm, applied

    def finish_gather(self) -> None:
        """Gather the parameters of the last step; a collective. Call it before parameters are read or moved.

        With `overlap_param_gather` the next update would gather them in its first forward pass.
        """
        if self._gathering:
            for ddp in self._ddp:
                ddp.start_param_sync(force_sync=True)
            self._gathering = False

    def _clear_gradients(self) -> None:
        for ddp in self._ddp:
            ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    def save(self, folder: Path, asynchronous: bool = False) -> None:
        """Write parameters, optimizer state, applied steps and RNG states into an empty folder; a collective.

        Args:
            folder: the folder.
            asynchronous: copy the state to host memory and return; `finish_save` completes the save.

        Raises:
            CheckpointError: a rank could not write, now or in an unfinished earlier save; raised on every rank.
        """
        self.finish_save()
        self.finish_gather()
        save = begin_save(folder, self._model, self._optimizer, self._applied_steps, staged=asynchronous)
        self._start_save(save, asynchronous)

    def load(self, folder: Path) -> None:
        """Load a state that `save` wrote with this or another layout; a collective.

        Raises:
            CheckpointError: the state is missing, damaged, or of another model; raised on every rank.
        """
        self.finish_gather()
        self._applied_steps = load_state(folder, self._model, self._optimizer)


def _wrap(model: ResponseModel) -> list[DistributedDataParallel]:
    """Wrap the model for data parallelism; gradients are summed, not averaged."""
    config, megatron_config = model.config, model.chunks[0].config
    wrapped = [
        DistributedDataParallel(
            megatron_config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=config.grad_reduce_in_fp32,
                overlap_grad_reduce=config.overlap_grad_reduce,
                overlap_param_gather=config.overlap_param_gather,
                use_distributed_optimizer=config.use_distributed_optimizer,
            ),
            chunk,
            disable_bucketing=number > 0,  # later virtual stages have all gradients at once
        )
        for number, chunk in enumerate(model.chunks)
    ]
    megatron_config.finalize_model_grads_func = _finalize_sums
    if config.overlap_grad_reduce:
        no_sync: Any = [ddp.no_sync for ddp in wrapped]
        megatron_config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def _reader(loss: Loss) -> Callable[[Tensor, MicroBatch], tuple[Tensor, Report]]:
    """Return the share of the loss of one micro-batch, with gradient, and its report."""

    def read(rows: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Report]:
        if micro_batch.batch is None:
            return rows.sum() * 0.0, (rows.new_zeros(()), {})
        value, metrics = loss(rows, micro_batch.packed_layout, micro_batch.batch)
        return value, (value.detach(), metrics)

    return read


def _finalize_sums(model: list[Any], _num_tokens: Tensor | None, **groups: Any) -> None:
    """Reduce gradients as sums, without division by tokens, micro-batches or data-parallel ranks."""
    finalize_model_grads(model, None, **groups)
