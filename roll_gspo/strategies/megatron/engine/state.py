"""The training state of a megatron trainer, in one form for every layout and optimizer.

Each parameter has three whole float32 tensors under its name in a model of one rank: `weight.NAME` (the master weight
if there is one), `exp_avg.NAME` and `exp_avg_sq.NAME`. Each rank writes its pieces. They are boxes of the whole tensor,
even if the distributed optimizer splits the flattened parameter. A reader requests the boxes that it needs. Nothing is
gathered, and any other layout can read the state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor
from torch.nn import Parameter

from roll_gspo.errors import CheckpointError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.weight_mapping import recipe
from roll_gspo.strategies.megatron.engine.model import ResponseModel
from roll_gspo.strategies.megatron.engine.parallel import expert_tensor_group, tensor_group
from roll_gspo.strategies.megatron.engine.sharded_files import begin_sharded_save, open_megatron_state, read_tensors
from roll_gspo.strategies.megatron.engine.weights import global_parameters
from roll_gspo.strategies.sharded_state import (
    Manifest,
    ShardedSave,
    agree,
    check_parameters,
    gathered,
    stored_tensors,
)
from roll_gspo.strategies.value_head import ValueHead

_WEIGHT, _MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
_EMBEDDING, _OUTPUT, _VALUE_HEAD = "embedding.word_embeddings.weight", "output_layer.weight", "value_head.weight"


@dataclass(frozen=True)
class _Layout:
    """Parallel layout of the ranks that wrote a state."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int | None
    context: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class _Piece:
    """The part of one model parameter on this rank.

    Attributes:
        name: name in a model of one rank.
        parameter: the local parameter.
        shape: shape of this rank's part in packed form.
        offset: offset of the part in the whole tensor.
        whole: shape of the whole tensor without padding.
        replica: index among the ranks with the same part; None marks a copy that never writes.
    """

    name: str
    parameter: Parameter
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    whole: tuple[int, ...]
    replica: int | None

    def boxes(self, key: str, flat: Tensor, start: int = 0, *, writes: bool = True) -> Iterator[ShardedTensor]:
        """Return views of `flat`, elements `start`, ... of the flattened part, as boxes of the whole tensor `key`.

        Padding of the vocabulary is in no box.
        """
        position = 0
        for offset, sizes in _boxes(self.shape, start, start + flat.numel()):
            numel = math.prod(sizes)
            data = flat[position : position + numel].view(sizes)
            position += numel
            offset = tuple(a + b for a, b in zip(offset, self.offset, strict=True))
            data = data[: max(0, self.whole[0] - offset[0])]
            if data.numel():
                yield ShardedTensor(
                    f"{key}.{self.name}",
                    data,
                    data.dtype,
                    tuple(data.shape),
                    self.whole,
                    offset,
                    axis_fragmentations=None,  # boxes do not have to form a grid
                    replica_id=0 if writes else 1,
                )


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, sizes) of consecutive boxes that cover elements `start` to `stop` of a flattened tensor."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    head = min(stop, -(-start // row) * row)  # up to the first whole row
    body = max(head, stop // row * row)  # up to the end of the last one
    for offset, sizes in _boxes(shape[1:], start % row, start % row + head - start):
        yield (start // row, *offset), (1, *sizes)
    if head < body:
        yield (head // row, *[0] * (len(shape) - 1)), ((body - head) // row, *shape[1:])
    for offset, sizes in _boxes(shape[1:], 0, stop - body):
        yield (body // row, *offset), (1, *sizes)


def _pieces(model: ResponseModel) -> list[_Piece]:
    """Return every parameter of this rank."""
    pieces = []
    for chunk in model.chunks:
        for name, parameter in global_parameters([chunk]):
            pieces.append(_piece(chunk, name, parameter, len(pieces), model.architecture))
    return pieces


def _canonical(name: str) -> str:
    """Map the names of TransformerEngine, grouped experts and megatron's own layers to one name."""
    name = re.sub(r"experts\.(linear_fc[12])\.weight(\d+)$", r"experts.local_experts.\2.\1.weight", name)
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def _piece(chunk: GPTModel, name: str, parameter: Parameter, number: int, architecture: Architecture) -> _Piece:
    name, copy = _canonical(name), False
    if name == _OUTPUT and isinstance(chunk.output_layer, ValueHead):
        name = _VALUE_HEAD
    elif name == _OUTPUT and chunk.share_embeddings_and_output_weights:
        name, copy = _EMBEDDING, True  # the last pipeline stage's
    packing, axis = "single", None
    if name != _VALUE_HEAD:
        made_of = recipe(name, architecture)
        packing, axis = made_of.packing, made_of.split_axis
    shape = tuple(parameter.shape)
    if packing == "gate_up" and axis is not None:  # each rank has its part of both, one over the other
        shape, axis = (2, shape[0] // 2, *shape[1:]), axis + 1
    cut_by, copied_by = _groups(name)
    offset, whole = [0] * len(shape), list(shape)
    if axis is not None:
        offset[axis], whole[axis] = cut_by.rank() * shape[axis], cut_by.size() * shape[axis]
    if packing == "vocab":
        whole[0] = architecture.vocab_size
    never = copy or (axis is None and cut_by.rank() != 0)
    # replicas alternate, so that all of them write similar amounts
    replica = None if never else (copied_by.rank() - number) % copied_by.size()
    return _Piece(name, parameter, shape, tuple(offset), tuple(whole), replica)


def _groups(name: str) -> tuple[Any, Any]:
    """Return the ranks that split a parameter, and those that have the same part of it."""
    if ".experts." in name:
        return expert_tensor_group(), parallel_state.get_expert_data_parallel_group()
    return tensor_group(), parallel_state.get_data_parallel_group(with_context_parallel=True)


class _Master(NamedTuple):
    """Elements from `start` of a flattened parameter that one torch optimizer updates."""

    tensor: Tensor
    start: int
    optimizer: torch.optim.Optimizer
    sharded: bool


def _masters(optimizer: MegatronOptimizer) -> dict[Parameter, _Master]:
    """Return the part of each parameter in this rank's optimizers. A distributed optimizer may have no part of it."""
    found = {}
    for part in optimizer.chained_optimizers:  # type: ignore[attr-defined]
        inner: Any = part.optimizer
        if inner is None:  # optimizer of a kind of parameter that this rank does not have
            continue
        pairs: list[
            tuple[Any, Any]
        ] = []  # groups of model parameters, groups of the tensors that the optimizer updates for them
        if isinstance(part, DistributedOptimizer):
            # model_param_group_index_map has the wrong order if a group has bfloat16 and float32 members
            pairs.append((part.model_float16_groups, part.shard_fp32_from_float16_groups))
            pairs.append((part.model_fp32_groups, part.shard_fp32_groups))
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            pairs.append((part.float16_groups, part.fp32_from_float16_groups))
            pairs.append((part.fp32_from_fp32_groups, part.fp32_from_fp32_groups))
        else:
            groups = [group["params"] for group in inner.param_groups]
            pairs.append((groups, groups))
        for parameter, master in (
            couple
            for of_model, stepped in pairs
            for group, masters in zip(of_model, stepped, strict=True)
            for couple in zip(group, masters, strict=True)
        ):
            start, sharded = 0, isinstance(part, DistributedOptimizer)
            if isinstance(part, DistributedOptimizer):
                start = part._get_model_param_range_map(parameter)["param"].start
            found[parameter] = _Master(master, start, inner, sharded)
    return found


def begin_save(
    folder: Path, model: ResponseModel, optimizer: MegatronOptimizer, applied_steps: int, *, staged: bool
) -> ShardedSave:
    """Plan a save of parameters, optimizer state, `applied_steps` and RNG states into an empty folder; a collective.

    Args:
        folder: the folder.
        model, optimizer: source of the state.
        applied_steps: number of applied optimizer steps.
        staged: copy this rank's data to host memory, so that training can continue.
    """
    pieces, masters = _pieces(model), _masters(optimizer)
    tensors = list(_tensors(pieces, masters, applied_steps))
    if staged:
        for tensor in tensors:
            if tensor.replica_id == 0 and tensor.data is not None:
                tensor.data = tensor.data.detach().to("cpu", copy=True)
    shapes = gathered(({piece.name: piece.whole for piece in pieces}, _rng_state()))
    whole = {name: shape for of_rank, _ in shapes for name, shape in of_rank.items()}
    manifest = Manifest(applied_steps, asdict(_layout()), whole)
    return begin_sharded_save(folder, tensors, {"rng": [rng for _, rng in shapes]}, manifest)


def _tensors(
    pieces: Sequence[_Piece], masters: dict[Parameter, _Master], applied_steps: int
) -> Iterator[ShardedTensor]:
    """Return this rank's part of the state."""
    for piece in pieces:
        master = masters.get(piece.parameter)
        if master is None:  # other ranks of a distributed optimizer have it
            continue
        writes = piece.replica is not None and (master.sharded or piece.replica == 0)
        flat = master.tensor.detach().view(-1)
        yield from piece.boxes(_WEIGHT, flat, master.start, writes=writes)
        if applied_steps:
            moments = master.optimizer.state[master.tensor]
            for key in _MOMENTS:
                yield from piece.boxes(key, moments[key].view(-1), master.start, writes=writes)


@torch.no_grad()
def load_state(folder: Path, model: ResponseModel, optimizer: MegatronOptimizer | None) -> int:
    """Read a state of any layout and return its applied steps; a collective.

    RNG states are restored if the layout is the same. Otherwise every rank gets torch's state of rank 0, and megatron's
    named states keep their seeds.

    Args:
        folder: the state.
        model: its weights are replaced.
        optimizer: its state is replaced; None reads only weights.

    Raises:
        CheckpointError: the state is missing, damaged, of a newer format, or of another model; raised on every rank.
    """
    manifest = open_megatron_state(folder)
    pieces = _pieces(model)
    mine = {piece.name: piece.whole for piece in pieces}
    check_parameters(folder, mine, manifest, {name for names in gathered(set(mine)) for name in names})
    if optimizer is not None and manifest.applied_steps:
        _check_optimizer(folder, manifest)
    targets, after = _weight_targets(pieces)
    if optimizer is not None:
        masters = _masters(optimizer)
        _prepare_moments(masters, manifest.applied_steps)
        for piece in pieces:
            master = masters.get(piece.parameter)
            if master is None:
                continue
            for key in _MOMENTS if manifest.applied_steps else ():
                flat = master.optimizer.state[master.tensor][key].view(-1)
                targets += piece.boxes(key, flat, master.start)
    common = read_tensors(folder, targets)
    for parameter, weight in after:
        parameter.copy_(weight)
        if optimizer is not None and (master := masters.get(parameter)) is not None:
            part = weight.view(-1)[master.start : master.start + master.tensor.numel()]
            master.tensor.copy_(part.view(master.tensor.shape))
    if optimizer is not None:
        _restore_rng(common["rng"], manifest.layout)
    return manifest.applied_steps


def _check_optimizer(folder: Path, manifest: Manifest) -> None:
    """Check that the state has the moments of every parameter; a collective."""
    problem = None
    try:
        stored = stored_tensors(folder)
        wanted = (f"{key}.{name}" for key in _MOMENTS for name in manifest.tensors)
        if missing := next((key for key in wanted if key not in stored), None):
            problem = (
                f"{folder}: holds no optimizer state ('{missing}' is not there); resume from a checkpoint that a "
                "training wrote, or start from these weights (python -m roll_gspo.export, then pretrain)"
            )
    except CheckpointError as error:
        problem = str(error)
    agree(problem)


def _weight_targets(pieces: Sequence[_Piece]) -> tuple[list[ShardedTensor], list[tuple[Parameter, Tensor]]]:
    """Return the tensors to read weights into: float32 parameters themselves, float32 buffers for others."""
    targets: list[ShardedTensor] = []
    after = []
    for piece in pieces:
        weight = piece.parameter.detach()
        if weight.dtype != torch.float32:
            weight = torch.zeros(weight.shape, dtype=torch.float32)
            after.append((piece.parameter, weight))
        targets += piece.boxes(_WEIGHT, weight.view(-1))
    return targets, after


def _prepare_moments(masters: dict[Parameter, _Master], applied_steps: int) -> None:
    """Give an optimizer `applied_steps` steps and allocated moments to read into."""
    for master in masters.values():
        state = master.optimizer.state
        if not applied_steps:
            state.pop(master.tensor, None)
            continue
        moments: dict[str, Any] = {key: torch.zeros_like(master.tensor.detach()) for key in _MOMENTS}
        if isinstance(master.optimizer, torch.optim.Adam):  # torch's optimizer counts steps per parameter, on the CPU
            moments["step"] = torch.tensor(float(applied_steps))
        state[master.tensor] = moments
    for optimizer in {id(master.optimizer): master.optimizer for master in masters.values()}.values():
        if not isinstance(optimizer, torch.optim.Adam):  # fused optimizers count in the group
            for group in optimizer.param_groups:
                group["step"] = applied_steps


def _layout() -> _Layout:
    return _Layout(
        world_size=dist.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        context=parallel_state.get_context_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor=expert_tensor_group().size(),
    )


def _tracker() -> Any:
    """Return megatron's named generators of parallel regions, created by `initialize_parallel`."""
    return get_cuda_rng_tracker()


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "tracker": _tracker().get_states()}


def _restore_rng(states: Sequence[dict[str, Any]], layout: Mapping[str, int | None]) -> None:
    if layout != asdict(_layout()):
        torch.set_rng_state(states[0]["torch"])
        return
    state = states[dist.get_rank()]
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    _tracker().set_states(state["tracker"])
