"""Around one GPTModel, whatever its head: megatron's data-parallel wrapper, schedule and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from roll_gspo.batch import TrainBatch
from roll_gspo.config.strategy import MegatronConfig
from roll_gspo.metrics import Metric, merge
from roll_gspo.strategies.base import OptimizerSetup, UpdateResult
from roll_gspo.strategies.megatron.model import ResponseModel
from roll_gspo.strategies.megatron.state import load_state, save_state
from roll_gspo.strategies.schedule import learning_rate

# a micro-batch on the model's device -> what the model says of it
Forward = Callable[[TrainBatch], Tensor]
# (what `Forward` returned, the micro-batch) -> (this micro-batch's share of the loss, metrics)
Loss = Callable[[Tensor, TrainBatch], tuple[Tensor, dict[str, Metric]]]
# what the loss function of one micro-batch reports through megatron's schedule
_Report = tuple[Tensor, dict[str, Metric]]


class MegatronTrainer:
    """AdamW with decoupled weight decay, none on biases and norms, and its schedule.

    The learning rate comes from `strategies.schedule`, set on the parameter groups before each step, so that every
    engine follows one formula.

    Args:
        model: what is trained; from now on it runs inside the data-parallel wrapper.
        setup: of optimizer and schedule.
        config: layout and memory.
    """

    def __init__(self, model: ResponseModel, setup: OptimizerSetup, config: MegatronConfig) -> None:
        self._setup = setup
        self._model = model
        self._ddp = model.wrapped = _wrap(model, config)
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
                use_distributed_optimizer=config.use_distributed_optimizer,
            ),
            [self._ddp],
        )
        self._applied_steps = 0

    def update(self, micro_batches: Sequence[TrainBatch], forward: Forward, loss: Loss) -> UpdateResult:
        """One optimizer step over all micro-batches; skipped where loss or gradient norm are not finite."""
        if not micro_batches:
            raise ValueError("update: no micro-batches")
        self._ddp.train()
        self._clear_gradients()
        reports: list[_Report] = get_forward_backward_func()(
            forward_step_func=_forward_step(forward, loss, self._model.device),
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

    def save(self, folder: Path) -> None:
        """Write `rank_000.pt`: parameters, optimizer state, applied steps and RNG states."""
        save_state(folder, self._model.gpt, self._optimizer, self._applied_steps)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote with the same layout.

        Raises:
            CheckpointError: there is none, or it is of another model.
        """
        self._applied_steps = load_state(folder, self._model.gpt, self._optimizer)


def _wrap(model: ResponseModel, config: MegatronConfig) -> DistributedDataParallel:
    """The data-parallel wrapper, with gradients accumulated in float32 and summed as they are."""
    gpt = model.gpt
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


def _forward_step(forward: Forward, loss: Loss, device: torch.device) -> Callable[..., Any]:
    """megatron's forward step: what the model says of the next micro-batch, and how a loss is made of it."""

    def step(
        batches: Iterator[TrainBatch], _: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, _Report]]]:
        batch = next(batches).to(device)

        def share_of_loss(output: Tensor) -> tuple[Tensor, Tensor, _Report]:
            value, metrics = loss(output, batch)
            no_tokens = torch.zeros((), dtype=torch.int, device=value.device)
            return value, no_tokens, (value.detach().clone(), metrics)

        return forward(batch), share_of_loss

    return step


def _finalize_sums(model: list[Any], _num_tokens: Tensor | None, **groups: Any) -> None:
    """Reduce gradients as sums: no division by tokens, micro-batches or data-parallel ranks."""
    finalize_model_grads(model, None, **groups)
