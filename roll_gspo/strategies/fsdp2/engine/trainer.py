"""The optimizer of a sharded model and its updates.

Legend: N response tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from roll_gspo.batch import TrainBatch
from roll_gspo.metrics import Metric, merge
from roll_gspo.strategies.adamw import make_adamw, step_at
from roll_gspo.strategies.base import OptimizerSetup, UpdateResult
from roll_gspo.strategies.fsdp2.engine.model import ShardedModel
from roll_gspo.strategies.fsdp2.engine.model_input import ModelInput
from roll_gspo.strategies.fsdp2.engine.state import begin_save, load_state
from roll_gspo.strategies.gathering import gather_reports
from roll_gspo.strategies.offload import EngineState, Part, outside
from roll_gspo.strategies.reports import Report
from roll_gspo.strategies.schedule import learning_rate
from roll_gspo.strategies.sharded_state import SavesShards

# (outputs [N, V] that predict response tokens, how the micro-batch lies, the micro-batch) -> (its share of the loss,
# metrics)
Loss = Callable[[Tensor, ModelInput, TrainBatch], tuple[Tensor, dict[str, Metric]]]


class Fsdp2Trainer(SavesShards):
    """AdamW with decoupled weight decay (none on biases and norms) and its schedule.

    Parameters, gradients and moments are float32 and sharded. With `dtype` bfloat16, layers are gathered and computed
    in bfloat16.

    Args:
        model: the trained model.
        setup: settings of optimizer and schedule.

    Attributes:
        state: the state that leaves the device between phases.
        applied_steps: optimizer steps that changed the parameters.
    """

    def __init__(self, model: ShardedModel, setup: OptimizerSetup) -> None:
        self._model = model
        self._setup = setup
        self._lora = None if model.adapter is None else model.adapter.setup
        self._named = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self._parameters = list(self._named.values())
        self._optimizer = make_adamw(self._parameters, setup)
        self.applied_steps = 0
        training = Part(lambda: outside(self._on_device(self._training_tensors()), self._weights()))
        self.state = EngineState("fsdp2_train", Part(self._weights), [training])

    def _weights(self) -> list[Tensor]:
        return self._on_device(weight_tensors(self._model.module))

    def _on_device(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the tensors in device memory. With `cpu_offload` most of the state never is."""
        return [tensor for tensor in tensors if tensor.device.type == self._model.device.type]

    def _training_tensors(self) -> Iterator[Tensor]:
        """Yield gradients, if there are any between updates, and the optimizer state, on this rank."""
        yield from (_local(parameter.grad) for parameter in self._parameters if parameter.grad is not None)
        for moments in self._optimizer.state.values():
            yield from (_local(value) for value in moments.values() if isinstance(value, Tensor))

    def update(self, micro_batches: Sequence[TrainBatch], loss: Loss) -> UpdateResult:
        """Take one optimizer step over all micro-batches; skip it if loss or gradient norm are not finite.

        Args:
            micro_batches: micro-batches of all ranks, on the CPU; each rank takes its share.
            loss: share of the loss of one micro-batch.
        """
        if not micro_batches:
            raise ValueError("update: no micro-batches")
        self._optimizer.zero_grad()
        reports: list[Report] = []
        with self._model.gathered():
            for batch in self._model.share(micro_batches, lambda batch: (batch.sequences, None)):
                if batch is None:
                    self._dummy_pass(micro_batches[0])
                    continue
                outputs, given = self._model.outputs(batch.sequences)
                share, metrics = loss(outputs, given, batch.to(self._model.device))
                share.backward()
                reports.append((share.detach(), metrics))
        of_all = gather_reports(reports)
        total = sum(value for value, _ in of_all)
        rate = learning_rate(self._setup, self.applied_steps)
        grad_norm, applied = self._step(rate, math.isfinite(total))
        return UpdateResult(total, grad_norm, rate, applied, merge(metrics for _, metrics in of_all))

    def _dummy_pass(self, batch: TrainBatch) -> None:
        """Take part in the communication of a pass that only other ranks have work for."""
        sample = batch.sequences.rows(torch.zeros(1, dtype=torch.int64))
        (self._model.outputs(sample)[0].sum() * 0.0).backward()

    def _step(self, rate: float, losses_finite: bool) -> tuple[float, bool]:
        """Step the optimizer and drop the gradients; return (gradient norm before clipping, whether it stepped)."""
        norm: Any = torch.nn.utils.clip_grad_norm_(self._parameters, self._setup.max_grad_norm or math.inf)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        applied = losses_finite and math.isfinite(grad_norm)
        if applied:
            step_at(self._optimizer, rate)
            self.applied_steps += 1
        self._optimizer.zero_grad()
        return grad_norm, applied

    def save(self, folder: Path, asynchronous: bool = False) -> None:
        """Write trained parameters, optimizer state, applied steps and RNG states; a collective.

        Args:
            folder: an empty folder that all ranks share.
            asynchronous: copy the state to host memory and return; `finish_save` completes the save.

        Raises:
            CheckpointError: a rank could not write, now or in an unfinished earlier save; raised on every rank.
        """
        self.finish_save()
        state = folder, self._named, self._optimizer, self.applied_steps
        save = begin_save(*state, staged=asynchronous, lora=self._lora)
        self._start_save(save, asynchronous)

    def load(self, folder: Path) -> None:
        """Load a state that `save` wrote with any number of ranks; a collective.

        Raises:
            CheckpointError: the state is missing, damaged, or of another model; raised on every rank.
        """
        self.applied_steps = load_state(folder, self._named, self._optimizer, self._lora)


def weight_tensors(module: Module) -> list[Tensor]:
    """Return the parameters and buffers of a module on this rank."""
    return [*map(_local, module.parameters()), *module.buffers()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
