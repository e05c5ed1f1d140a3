"""The optimizer of the transformers engines. It shows every step of an update in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roll_gspo.batch import TrainBatch
from roll_gspo.checkpoint import BackgroundWrite
from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.metrics import Metric, merge
from roll_gspo.strategies.adamw import make_adamw, step_at
from roll_gspo.strategies.base import OptimizerSetup, UpdateResult
from roll_gspo.strategies.lora import check_same_adapter, identity_of, other_layers
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.offload import EngineState, Part, outside
from roll_gspo.strategies.reports import Report, on_host
from roll_gspo.strategies.restricted_load import load_restricted, unreadable
from roll_gspo.strategies.schedule import learning_rate

_STATE_FILE = "hf_train.pt"


class HfTrainer:
    """AdamW and its schedule for a float32 module with any head, or for the float32 adapter of a frozen module.

    Gradients and moments are float32. With `dtype` bfloat16 the passes run under autocast. Weight decay is decoupled
    and excludes biases and norms.

    Attributes:
        applied_steps: optimizer steps that changed the parameters.

    Args:
        module: trained module, on its device.
        setup: settings of optimizer and schedule.
        dtype: dtype of the passes.
        lora: the adapter of the module; None if all parameters are trained.

    Raises:
        ConfigError: the dtype is not supported.
    """

    def __init__(
        self, module: torch.nn.Module, setup: OptimizerSetup, dtype: torch.dtype, lora: LoraSetup | None = None
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"hf_train: dtype {dtype} is not supported; use float32 or bfloat16")
        self._module = module
        self._setup = setup
        self._dtype = dtype
        self._lora = lora
        parameters = list(self._trained().values())
        self._device = parameters[0].device
        self._optimizer = make_adamw(parameters, setup)
        self.applied_steps = 0
        self._saving: BackgroundWrite | None = None

    def state(self, engine: str) -> EngineState:
        """Return the movable state of the engine that owns this trainer."""
        return EngineState(
            engine, Part(self._weights), [Part(lambda: outside(self._training_tensors(), self._weights()))]
        )

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self._module.named_parameters() if value.requires_grad}

    def _weights(self) -> list[Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]

    def _training_tensors(self) -> Iterator[Tensor]:
        """Yield gradients, if there are any between updates, and the optimizer state."""
        yield from (parameter.grad for parameter in self._module.parameters() if parameter.grad is not None)
        for moments in self._optimizer.state.values():
            yield from (value for value in moments.values() if isinstance(value, Tensor))

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass (autocast or none)."""
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def update(
        self,
        micro_batches: Sequence[TrainBatch],
        loss: Callable[[TrainBatch], tuple[Tensor, dict[str, Metric]]],
    ) -> UpdateResult:
        """Take one optimizer step; skip it if loss or gradient norm are not finite.

        Args:
            micro_batches: micro-batches of one mini-batch, on any device.
            loss: forward pass and loss share of one micro-batch, on the module's device.
        """
        if not micro_batches:
            raise ValueError("update: no micro-batches")
        self._optimizer.zero_grad()
        reports: list[Report] = []
        for batch in micro_batches:
            share, metrics = loss(batch.to(self._device))
            share.backward()
            reports.append((share.detach(), metrics))
        max_norm = self._setup.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), max_norm).item()
        known = on_host(reports)
        losses = [value for value, _ in known]
        rate = learning_rate(self._setup, self.applied_steps)
        applied = math.isfinite(grad_norm) and all(map(math.isfinite, losses))
        if applied:
            step_at(self._optimizer, rate)
            self.applied_steps += 1
        self._optimizer.zero_grad()
        return UpdateResult(sum(losses), grad_norm, rate, applied, merge(metrics for _, metrics in known))

    def save(self, folder: Path, asynchronous: bool = False) -> None:
        """Write trained parameters, optimizer state, applied steps and RNG states into one file.

        Args:
            folder: an empty folder.
            asynchronous: copy the state to host memory and return; `finish_save` completes the save.
        """
        self.finish_save()
        state = {
            "parameters": self._trained(),
            "optimizer": self._optimizer.state_dict(),
            "applied_steps": self.applied_steps,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        if self._lora is not None:
            state["adapter"] = identity_of(self._lora)
        if asynchronous:
            state = _on_host(state)
            self._saving = BackgroundWrite(lambda: torch.save(state, folder / _STATE_FILE))
        else:
            torch.save(state, folder / _STATE_FILE)

    def finish_save(self, wait: bool = True) -> bool:
        """Return whether the last `save` is complete (True if there was none); block until it is if `wait`.

        Raises:
            Exception: the error of torch if the file cannot be written.
        """
        if self._saving is None:
            return True
        if not wait and not self._saving.done:
            return False
        saving, self._saving = self._saving, None
        saving.wait()
        return True

    def load(self, folder: Path) -> None:
        """Load a state that `save` wrote.

        Raises:
            CheckpointError: the file does not exist or belongs to another model.
        """
        path = folder / _STATE_FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; the checkpoint is of another strategy or incomplete")
        state = load_restricted(path)
        try:
            self._restore(state, path)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise unreadable(path, error) from error

    def _restore(self, state: Any, path: Path) -> None:
        check_same_adapter(path, state.get("adapter"), self._lora)
        parameters = self._trained()
        if self._lora is not None and parameters.keys() != state["parameters"].keys():
            raise other_layers(path)
        if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in state["parameters"].items()}:
            raise CheckpointError(f"{path}: parameters of another model; use the configuration that wrote it")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.applied_steps = state["applied_steps"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])


def _on_host(value: Any) -> Any:
    """Return the same values with copies of the tensors in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list) else value
