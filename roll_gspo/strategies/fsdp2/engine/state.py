"""The training state of a model that is sharded over ranks, in one form for any number of them.

Each trained parameter has three tensors under its name in the model: `weight.NAME` (the float32 master weight),
`exp_avg.NAME` and `exp_avg_sq.NAME`. Each rank writes its shards and reads the parts that it needs, so nothing is
gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from roll_gspo.errors import CheckpointError
from roll_gspo.strategies.fsdp2.engine.boxes import Box, BoxSavePlanner, box_of, local_part, read_boxes
from roll_gspo.strategies.lora import check_same_adapter, identity_of, other_layers
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.restricted_load import load_restricted, unreadable
from roll_gspo.strategies.sharded_state import (
    Manifest,
    ShardedSave,
    StateFormat,
    agree,
    check_parameters,
    gathered,
    open_state,
    rank,
    stored_tensors,
    world_size,
)
from roll_gspo.strategies.untrusted_state import COMMON

_FORMAT = StateFormat("fsdp2", 1)
_WEIGHT, _MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


def begin_save(
    folder: Path,
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    applied_steps: int,
    *,
    staged: bool,
    lora: LoraSetup | None = None,
) -> ShardedSave:
    """Plan a save of parameters, their optimizer state, `applied_steps` and RNG states; a collective.

    Args:
        folder: an empty folder.
        parameters: the trained parameters by name, sharded or not. Frozen parameters need no place in a state.
        optimizer: AdamW of these parameters.
        applied_steps: number of applied optimizer steps.
        staged: copy this rank's data to host memory, so that training can continue.
        lora: the adapter that the parameters are; None if they are not an adapter's.
    """
    boxes = list(_boxes(parameters, optimizer))
    if staged:
        boxes = [replace(box, data=box.data.to("cpu", copy=True)) for box in boxes]
    manifest = Manifest(
        applied_steps,
        {"world_size": world_size()},
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
    )
    # A parameter without a gradient so far has no moments, and fewer steps than the optimizer.
    steps = {
        name: int(optimizer.state[parameter]["step"])
        for name, parameter in parameters.items()
        if optimizer.state.get(parameter)
    }
    common = {"rng": gathered(_rng_state()), "steps": steps, "adapter": identity_of(lora)}
    return ShardedSave(folder, BoxSavePlanner(boxes), common, _FORMAT, manifest)


def _boxes(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer) -> Iterator[Box]:
    """Yield this rank's part of the state."""
    for name, parameter in parameters.items():
        yield box_of(f"{_WEIGHT}.{name}", parameter)
        if moments := optimizer.state.get(parameter):
            for key in _MOMENTS:
                yield box_of(f"{key}.{name}", moments[key])


@torch.no_grad()
def load_state(
    folder: Path,
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    lora: LoraSetup | None = None,
) -> int:
    """Read a state of any number of ranks and return its applied steps; a collective.

    The state is read into new memory first, so an error changes nothing. RNG states are restored if the number of ranks
    is the same. Otherwise every rank gets those of rank 0.

    Args:
        folder: the state.
        parameters: the trained parameters by name. FSDP must have freed their unsharded copies.
        optimizer: AdamW of these parameters.
        lora: the adapter that the parameters are; None if they are not an adapter's.

    Raises:
        CheckpointError: the state is missing, damaged, of a newer format, or of another model or adapter; raised on
            every rank.
    """
    manifest = _open(folder, parameters, lora)
    problem, values, weights, moments = None, None, {}, {}
    try:
        values = _read_values(folder, manifest)
        weights = {name: _host_memory(parameter) for name, parameter in parameters.items()}
        moments = {
            name: {key: torch.zeros_like(parameters[name], memory_format=torch.preserve_format) for key in _MOMENTS}
            for name in values.steps
        }
        targets = [box_of(f"{_WEIGHT}.{name}", parameters[name], data) for name, data in weights.items()]
        targets += [box_of(f"{key}.{name}", data) for name, pair in moments.items() for key, data in pair.items()]
        read_boxes(folder, targets)
    except CheckpointError as error:
        problem = str(error)
    agree(problem)
    assert values is not None
    for name, parameter in parameters.items():
        local_part(parameter).copy_(weights.pop(name))
    _set_moments(optimizer, parameters, moments, values.steps)
    _restore_rng(values.rng, manifest)
    return manifest.applied_steps


def load_weights(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Read the weights of a state of any number of ranks into tensors of any dtype; a collective.

    At most one stored piece is in memory at a time. If reading fails, some tensors may have changed already.

    Raises:
        CheckpointError: the state is missing, damaged, of a newer format, or of another model; raised on every rank.
    """
    _open(folder, parameters, lora=None)
    problem = None
    try:
        read_boxes(folder, [box_of(f"{_WEIGHT}.{name}", parameter) for name, parameter in parameters.items()])
    except CheckpointError as error:
        problem = str(error)
    agree(problem)


def _open(folder: Path, parameters: Mapping[str, Tensor], lora: LoraSetup | None) -> Manifest:
    """Check the files of a state, and that it belongs to this model and adapter; a collective."""
    manifest, problem = open_state(folder, _FORMAT), None
    try:
        _check_adapter(folder / COMMON, lora)
        if lora is not None and manifest.tensors.keys() != parameters.keys():
            raise other_layers(folder)
    except CheckpointError as error:
        problem = str(error)
    agree(problem)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    check_parameters(folder, shapes, manifest, shapes)
    return manifest


def _check_adapter(path: Path, lora: LoraSetup | None) -> None:
    """Check that the values of a state are of this adapter."""
    common = load_restricted(path)
    try:
        check_same_adapter(path, common.get("adapter"), lora)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise unreadable(path, error) from error


class _Values(NamedTuple):
    """Values of a state besides its tensors: RNG states of every rank, and optimizer steps by parameter."""

    rng: Sequence[Mapping[str, Tensor | None]]
    steps: Mapping[str, int]


def _read_values(folder: Path, manifest: Manifest) -> _Values:
    """Read and check the values that rank 0 wrote.

    Raises:
        CheckpointError: they are not those of an `fsdp2` state.
    """
    path = folder / COMMON
    common = load_restricted(path)
    try:
        rng, steps = common["rng"], {str(name): int(step) for name, step in common["steps"].items()}
        for state in rng:
            torch.Generator().set_state(state["torch"])
            if state["cuda"] is not None and torch.cuda.is_available():
                torch.Generator("cuda").set_state(state["cuda"])
        if len(rng) != manifest.layout["world_size"]:
            raise ValueError(f"it has RNG states of {len(rng)} ranks")
        if unknown := steps.keys() - manifest.tensors.keys():
            raise ValueError(f"it has steps of '{min(unknown)}', which is no parameter")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise unreadable(path, error) from error
    stored = stored_tensors(folder)
    wanted = [f"{key}.{name}" for name in steps for key in _MOMENTS] or [*_MOMENTS]
    missing = next((key for key in wanted if key not in stored), None)
    if manifest.applied_steps and missing is not None:
        raise CheckpointError(
            f"{folder}: holds no optimizer state ('{missing}' is not there); resume from a checkpoint that a training "
            "wrote, or start from these weights (python -m roll_gspo.export, then pretrain)"
        )
    return _Values(rng, steps)


def _host_memory(parameter: Tensor) -> Tensor:
    """Return memory for this rank's part of a parameter on the host."""
    return torch.empty_like(local_part(parameter), device="cpu")


def _set_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Parameter],
    moments: Mapping[str, Mapping[str, Tensor]],
    steps: Mapping[str, int],
) -> None:
    """Replace the optimizer's state. torch numbers parameters by their position in all groups."""
    names = {parameter: name for name, parameter in parameters.items()}
    numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {"step": torch.tensor(float(steps[name])), **moments[name]}
        for number, name in enumerate(names[parameter] for parameter in numbered)
        if name in steps
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _rng_state() -> dict[str, Tensor | None]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _restore_rng(states: Sequence[Mapping[str, Any]], manifest: Manifest) -> None:
    state = states[rank() if manifest.layout["world_size"] == world_size() else 0]
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
