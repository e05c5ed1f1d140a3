"""Weights of a sharded model: reading a rank's part of a checkpoint, and export under checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import Module, Parameter

from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.strategies.checkpoint_names import CheckpointNames
from roll_gspo.strategies.lora import Adapter, without_base_layer


def stored_shapes(reader: CheckpointReader) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in a checkpoint; reads only headers."""
    return {name: reader.shape(name) for name in sorted(reader.names)}


@torch.no_grad()
def load_shards(
    module: Module, names: CheckpointNames, reader: CheckpointReader, device: torch.device, fresh: Mapping[str, Tensor]
) -> None:
    """Give every parameter of this rank memory and its part of the checkpoint; one parameter is read at a time.

    Args:
        module: a sharded module whose parameters are on the meta device; its buffers have values.
        names: names of its parameters in the checkpoint.
        reader: the checkpoint.
        device: device of the parameters.
        fresh: whole values of parameters that the checkpoint does not have.

    Raises:
        ConfigError: the weights lack a parameter.
    """
    owners: dict[int, list[tuple[Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((owner, name))
    sharded: list[tuple[str, Any]] = list(module.named_parameters())
    for name, parameter in sharded:
        stored = without_base_layer(name)
        local = torch.empty(parameter.to_local().shape, dtype=parameter.dtype, device=device)
        start, stop = own_rows(parameter)
        if stop > start:
            local.copy_(fresh[name][start:stop] if name in fresh else _read(names, stored, reader, start, stop))
        made = DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        replacement = Parameter(made, requires_grad=parameter.requires_grad)
        for owner, own_name in owners[id(parameter)]:
            owner.register_parameter(own_name, replacement)
    for name, buffer in persistent_buffers(module):
        buffer.copy_(_read(names, name, reader, 0, None))


def persistent_buffers(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of a module that checkpoints hold; every rank has them whole."""
    kept = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def own_rows(parameter: DTensor) -> tuple[int, int]:
    """Return the rows `start:stop` of dimension 0 that this rank holds."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], offset[0] + (shape[0] if 0 not in shape else 0)


def _read(names: CheckpointNames, name: str, reader: CheckpointReader, start: int, stop: int | None) -> Tensor:
    try:
        return names.join(name, reader.read, start, stop)
    except CheckpointError as error:
        # a random value in its place would go unnoticed
        raise ConfigError(f"{reader.folder}: {error}") from error


class ShardedWeights:
    """The live weights and persistent buffers of a sharded model under checkpoint names (see `WeightSource`).

    An iteration is a collective: every rank iterates to the end and gets every whole tensor. Besides its own part, a
    rank holds one whole parameter.

    Args:
        module: the module at rest, i.e. with sharded parameters.
        names: names of its parameters in checkpoints.
        dtype: dtype of the yielded weights. Buffers keep their own.
        adapter: adapter of the module, which is merged into the yielded weights; None if it has none.
    """

    def __init__(
        self, module: Module, names: CheckpointNames, dtype: torch.dtype, adapter: Adapter | None = None
    ) -> None:
        self._module = module
        self._names = names
        self._dtype = dtype
        self._adapter = adapter

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._names.stream(self._parameters())
        yield from self._names.stream(persistent_buffers(self._module))

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        if self._adapter is not None:
            for name, value in self._adapter.merged_parameters(whole):
                yield name, value.to(self._dtype)
            return
        # named_parameters lists each tensor once, the embedding first; so a tied head is not listed
        for name, parameter in self._module.named_parameters():
            yield name, whole(parameter.detach().to(self._dtype))


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter with the parts of all ranks; a collective."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
