"""Functions that ranks run to compare exported weights with their checkpoint."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import model_setup, optimizer_setup
from torch import Tensor

from roll_gspo.errors import CheckpointError
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.strategies.megatron.config import MegatronConfig


def exported(folders: list[Path], layout: dict[str, Any], dtype: torch.dtype, bucket_bytes: int) -> list[list[str]]:
    """Load each checkpoint in a layout and export it; check all values and return the names."""
    from roll_gspo.strategies.megatron.engine.model import build_model
    from roll_gspo.strategies.megatron.engine.weights import MegatronWeights

    names = []
    for folder in folders:
        model = build_model(model_setup(folder, dtype), MegatronConfig(**layout))
        reader = CheckpointReader(folder)
        source = MegatronWeights(model.chunks, model.architecture, bucket_bytes)
        found: list[str] = []
        for _ in range(2):  # the export plan is made once
            found = []
            for name, tensor in source:
                want = reader.read(name).to(dtype)
                assert tensor.dtype == dtype and torch.equal(tensor, want), name
                found.append(name)
        assert reader.names - set(found) <= {"lm_head.weight"}
        names.append(found)
    return names


def exported_grouped(folder: Path, layout: dict[str, Any]) -> list[str]:
    """Load and export a mixture of experts with grouped weight names; return the names.

    The kernels of such products need CUDA; here their parameters alone take the place of the experts.
    """
    from roll_gspo.strategies.megatron.engine.model import build_model
    from roll_gspo.strategies.megatron.engine.weights import MegatronWeights, load_weights

    model = build_model(model_setup(folder), MegatronConfig(**layout))
    for chunk in model.chunks:
        decoder: Any = chunk.decoder
        for layer in decoder.layers:
            experts = layer.mlp.experts
            grouped = torch.nn.Module()
            for kind in ("linear_fc1", "linear_fc2"):
                weights = [getattr(expert, kind).weight for expert in experts.local_experts]
                part = torch.nn.Module()
                for number, weight in enumerate(weights):
                    part.register_parameter(f"weight{number}", torch.nn.Parameter(torch.zeros_like(weight)))
                grouped.add_module(kind, part)
            layer.mlp.experts = grouped
    reader = CheckpointReader(folder)
    load_weights(model.chunks, reader, model.architecture)
    names = []
    for name, tensor in MegatronWeights(model.chunks, model.architecture):
        assert torch.equal(tensor, reader.read(name)), name
        names.append(name)
    assert set(names) == reader.names
    return names


def changed(folder: Path, layout: dict[str, Any]) -> dict[str, float]:
    """Double every parameter between two exports of one source; return the sum of each exported tensor."""
    from roll_gspo.strategies.megatron.engine.model import build_model
    from roll_gspo.strategies.megatron.engine.weights import MegatronWeights

    model = build_model(model_setup(folder), MegatronConfig(**layout))
    source = MegatronWeights(model.chunks, model.architecture)
    before = {name: tensor.clone() for name, tensor in source}
    with torch.no_grad():
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(2)
    for name, tensor in source:
        assert torch.equal(tensor, 2 * before[name]), name
    return {name: float(tensor.sum()) for name, tensor in before.items()}


def held(folder: Path) -> tuple[list[str], list[str]]:
    """Keep all tensors of two exports until their end; return names with wrong values, with and without copies."""
    from roll_gspo.strategies.kept_weights import KeptWeights
    from roll_gspo.strategies.megatron.engine.model import build_model
    from roll_gspo.strategies.megatron.engine.weights import MegatronWeights

    model = build_model(model_setup(folder), MegatronConfig(tensor_model_parallel_size=2))
    reader, source = CheckpointReader(folder), MegatronWeights(model.chunks, model.architecture)
    kept, overwritten = (
        [name for name, tensor in list(weights) if not torch.equal(tensor, reader.read(name))]
        for weights in (KeptWeights(source), source)
    )
    return kept, overwritten


def exported_memory(folder: Path, layout: dict[str, Any], bucket_bytes: int, keep: bool) -> tuple[int, int]:
    """Return (peak bytes allocated during an export, bound: one bucket or parameter plus one tensor).

    Args:
        keep: clone every tensor, as no consumer should; for the figure to be seen to grow.
    """
    from torch.profiler import ProfilerActivity, profile

    from roll_gspo.strategies.megatron.engine.model import build_model
    from roll_gspo.strategies.megatron.engine.weights import MegatronWeights, global_parameters

    model = build_model(model_setup(folder), MegatronConfig(**layout))
    source = MegatronWeights(model.chunks, model.architecture, bucket_bytes)
    largest = max(tensor.nbytes for _, tensor in source)
    tensor_ranks = model.config.tensor_model_parallel_size
    parameters: list[Any] = [None] * dist.get_world_size()
    mine = max(parameter.nbytes * tensor_ranks for _, parameter in global_parameters(model.chunks))
    dist.all_gather_object(parameters, mine)
    kept: list[Tensor] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _, tensor in source:
            if keep:
                kept.append(tensor.clone())
    results: Any = profiled.profiler and profiled.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, max(bucket_bytes, *parameters) + largest


def saved(folder: Path, layout: dict[str, Any], target: Path, max_file_bytes: int | None) -> str | None:
    """Run `save_hf` in a layout and return the error, if any. Rank 0 is limited to `max_file_bytes` per file."""
    from roll_gspo.strategies.megatron.engine import MegatronTrain

    engine = MegatronTrain(model_setup(folder), optimizer_setup(), MegatronConfig(**layout))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if max_file_bytes is not None and dist.get_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, hard))
        engine.save_hf(target)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # every rank waits for the write
    assert CheckpointReader(target).names and (target / "config.json").is_file()
    return None


def refused(folder: Path, layout: dict[str, Any]) -> str:
    """Return the error of loading a checkpoint in a layout."""
    from roll_gspo.strategies.megatron.engine.model import build_model

    try:
        build_model(model_setup(folder), MegatronConfig(**layout))
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it was loaded")
