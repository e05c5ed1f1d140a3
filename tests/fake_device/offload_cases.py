"""Engines that leave the fake device; run in a process that runs nothing else."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from engine_cases import model_setup, sequences
from fake_device.backend import DeviceTensor
from fake_device.cases import OPTIMIZER, batch_of_everything, loss_of
from fake_device.engines import device
from torch import Tensor

from roll_gspo.strategies import offload
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.residency import Residency


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Return the memory of a tensor; that of the device is behind its values."""
    return (tensor.inner if isinstance(tensor, DeviceTensor) else tensor).untyped_storage()


def device_bytes() -> int:
    """Return the size of the memory behind all tensors of the device that are alive."""
    gc.collect()
    alive = [found for found in gc.get_objects() if isinstance(found, DeviceTensor)]
    storages = {storage._cdata: storage.nbytes() for storage in map(_storage_of, alive)}
    return sum(storages.values())


def leaving(folder: Path, engine: str, config: dict[str, Any], dtype: torch.dtype) -> dict[str, int]:
    """Train, leave, return and train again; return the bytes on the device at each residency, relative to the start.

    A trainer that stays gives the same numbers.
    """
    offload.storage_of = _storage_of
    batch = batch_of_everything()
    with device():
        start = device_bytes()
        trainer = _trainer(folder, engine, config, dtype)
        first = trainer.update(batch.split(2), loss_of(batch), True)
        assert first.applied
        found = {"FULL": device_bytes() - start}
        scores = trainer.score(sequences()).log_probs
        for residency in (Residency.WEIGHTS, Residency.OFFLOADED):
            trainer.reside(residency)
            found[residency.name] = device_bytes() - start
        trainer.reside(Residency.WEIGHTS)
        assert torch.equal(trainer.score(sequences()).log_probs, scores)
        trainer.reside(Residency.FULL)
        found["again"] = device_bytes() - start
        second = trainer.update(batch.split(2), loss_of(batch), True)
        stays = _trainer(folder, engine, config, dtype)
        for moved in (first, second):
            result = stays.update(batch.split(2), loss_of(batch), True)
            assert (result.loss, result.grad_norm) == (moved.loss, moved.grad_norm)
        found["parameters"] = sum(parameter.nbytes for parameter in _parameters(trainer))
    return found


def _trainer(folder: Path, engine: str, config: dict[str, Any], dtype: torch.dtype) -> Any:
    setup = model_setup(folder, dtype, micro_batch_size=2)
    if engine == "hf":
        return HfTrain(setup, OPTIMIZER, HfConfig(**config))
    from roll_gspo.strategies.megatron.engine import MegatronTrain

    return MegatronTrain(setup, OPTIMIZER, MegatronConfig(**config))


def _parameters(trainer: Any) -> list[Tensor]:
    return [tensor for _, tensor in trainer.weights()]
