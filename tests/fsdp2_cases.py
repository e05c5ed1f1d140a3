"""Functions that every rank of a world runs in the tests of the FSDP2 engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import model_setup, optimizer_setup, policy_loss, sequences, train_batch, value_batch
from safetensors.torch import load_file
from torch import Tensor

from roll_gspo.batch import TrainBatch
from roll_gspo.errors import CheckpointError
from roll_gspo.metrics import Metric, to_floats
from roll_gspo.strategies.base import AdapterStrategy, TrainStrategy, ValueStrategy
from roll_gspo.strategies.fsdp2.config import Fsdp2Config
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.micro_batches import MicroBatching

OPTIMIZER = optimizer_setup(learning_rate=1e-3)


def train_engine(
    folder: Path, options: dict[str, Any] | None, dtype: torch.dtype = torch.float32, lora: LoraSetup | None = None
) -> TrainStrategy:
    """Return an `Fsdp2Train` with these options, or an `HfTrain` if there are none."""
    setup = replace(model_setup(folder, dtype), lora=lora)
    if options is None:
        from roll_gspo.strategies.hf.train import HfTrain

        return HfTrain(setup, OPTIMIZER, HfConfig())
    from roll_gspo.strategies.fsdp2.engine.train import Fsdp2Train

    return Fsdp2Train(setup, OPTIMIZER, Fsdp2Config(**options))


def trained(
    folder: Path, options: dict[str, Any] | None, dtype: torch.dtype = torch.float32, size: int = 2
) -> dict[str, Any]:
    """Score, update three times and score again."""
    engine = train_engine(folder, options, dtype)
    before = engine.score(sequences(), entropy=True)
    results = [engine.update(MicroBatching(size).split(train_batch(step)), policy_loss, True) for step in range(3)]
    after = engine.score(sequences(), entropy=True)
    return {
        "scores": [before.log_probs, before.entropy, after.log_probs, after.entropy],
        "updates": [[result.loss, result.grad_norm, result.learning_rate] for result in results],
        "metrics": [to_floats(result.metrics) for result in results],
        "weights": {name: tensor.clone() for name, tensor in engine.weights()},
    }


def trained_adapter(
    folder: Path, options: dict[str, Any] | None, out: Path, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> dict[str, Any]:
    """Train an adapter in three updates and export it into `out`."""
    lora = LoraSetup(rank=4, alpha=8.0, dropout=dropout, use_rslora=True)
    engine = train_engine(folder, options, dtype, lora)
    assert isinstance(engine, AdapterStrategy)
    before = engine.score(sequences()).log_probs
    results = [engine.update(MicroBatching(2).split(train_batch(step)), policy_loss, True) for step in range(3)]
    if not dist.is_initialized() or dist.get_rank() == 0:
        out.mkdir(exist_ok=True)
    engine.save_hf(out)
    return {
        "before": before,
        "after": engine.score(sequences()).log_probs,
        "base": engine.score_base(sequences()).log_probs,
        "updates": [[result.loss, result.grad_norm] for result in results],
        "adapter": load_file(out / "adapter" / "adapter_model.safetensors"),
        "merged": {name: tensor.clone() for name, tensor in engine.weights()},
    }


def failed_export(folder: Path, out: Path) -> str:
    """Return the error of an export into a folder that cannot exist."""
    from roll_gspo.errors import CheckpointError

    engine = train_engine(folder, {}, lora=LoraSetup(rank=4, alpha=8.0))
    assert isinstance(engine, AdapterStrategy)
    try:
        engine.save_adapter(out)
    except CheckpointError as error:
        return str(error)
    return ""


def resumed_adapter(folder: Path, saved: Path | None, loaded: Path | None) -> dict[str, Any]:
    """Update and save into `saved`, or load from `loaded`; then update twice more."""
    engine = train_engine(folder, {}, lora=LoraSetup(rank=4, alpha=8.0, sync="adapter"))
    if saved is not None:
        engine.update(MicroBatching(2).split(train_batch(7)), policy_loss, True)
        if dist.get_rank() == 0:
            saved.mkdir()
        dist.barrier()
        engine.save(saved)
    if loaded is not None:
        engine.load(loaded)
    results = [engine.update(MicroBatching(2).split(train_batch(step)), policy_loss, True) for step in range(2)]
    adapter = {name: tensor.clone() for name, tensor in engine.weights()}
    return {"updates": [[result.loss, result.grad_norm] for result in results], "adapter": adapter}


def refused_adapter(folder: Path, loaded: Path) -> str:
    """Load a state with another rank of the adapter; return the error."""
    try:
        train_engine(folder, {}, lora=LoraSetup(rank=8, alpha=8.0)).load(loaded)
    except CheckpointError as error:
        return str(error)
    return ""


def valued(folder: Path, options: dict[str, Any] | None) -> dict[str, Any]:
    """Train a critic three times and return its values before and after."""
    engine: ValueStrategy
    if options is None:
        from roll_gspo.strategies.hf.value import HfValue

        engine = HfValue(model_setup(folder), OPTIMIZER, HfConfig())
    else:
        from roll_gspo.strategies.fsdp2.engine.value import Fsdp2Value

        engine = Fsdp2Value(model_setup(folder), OPTIMIZER, Fsdp2Config(**options))
    before = engine.values(sequences())
    results = [engine.update(MicroBatching(2).split(value_batch(step)), _value_loss) for step in range(3)]
    return {
        "values": [before, engine.values(sequences())],
        "updates": [[result.loss, result.grad_norm] for result in results],
    }


def _value_loss(values: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
    assert batch.returns is not None
    return torch.where(batch.response_mask, values - batch.returns, 0.0).square().sum() / 41, {}


def largest_share(folder: Path) -> float:
    """Return the largest share of the model's bytes that the parameters of this rank had while it was loaded."""
    from roll_gspo.strategies.fsdp2.engine.model import build_sharded
    from roll_gspo.strategies.fsdp2.engine.trainer import weight_tensors

    model = build_sharded(model_setup(folder), Fsdp2Config(), trained=True)
    mine = sum(tensor.nbytes for tensor in weight_tensors(model.module))
    return mine / sum(parameter.numel() * 4 for parameter in model.module.parameters())
