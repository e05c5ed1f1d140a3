"""Weights of a GPTModel: reading from a Hugging Face checkpoint, and export under Hugging Face names."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from roll_gspo.errors import CheckpointError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.checkpoint_shapes import checkpoint_shapes
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.models.weight_mapping import Recipe, recipe
from roll_gspo.strategies.device import local_device
from roll_gspo.strategies.megatron.engine.parallel import (
    expert_group,
    expert_tensor_group,
    pipeline_group,
    tensor_group,
)

# tensors of some checkpoints that are recomputed here or repeat the embedding
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)
_TIED_HEAD = "lm_head.weight"

_EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=experts\.linear_fc[12]\.weight)\d+")


@torch.no_grad()
def load_weights(chunks: Sequence[GPTModel], reader: CheckpointReader, architecture: Architecture) -> None:
    """Fill every parameter of this rank, one at a time. Only this rank's part of each tensor is read.

    The headers of the whole checkpoint are checked first, so that either every rank rejects it or none.

    Raises:
        CheckpointError: a weight is missing, has another shape, or is not part of the model.
    """
    shapes = checkpoint_shapes(architecture)
    tied = architecture.tie_word_embeddings
    reader.check(shapes, (*_NOT_WEIGHTS, _TIED_HEAD) if tied else _NOT_WEIGHTS, architecture.prefix)
    for name, parameter in global_parameters(chunks):
        if name == "output_layer.weight" and tied:
            name = "embedding.word_embeddings.weight"  # the last pipeline stage has a copy
        group = _cutting_group(name)
        part = recipe(name, architecture).shard(reader.read, shapes, architecture, group.rank(), group.size())
        if part.shape != parameter.shape:
            raise CheckpointError(
                f"{reader.folder}: '{name}' is made with the shape {tuple(parameter.shape)}, the checkpoint fills "
                f"{tuple(part.shape)}; this layout is not supported, change strategy_config"
            )
        parameter.copy_(part)


def global_parameters(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Return the parameters of this rank under their names in a model of one rank."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _global_name(chunk, name), parameter


def _global_name(chunk: GPTModel, name: str) -> str:
    """Replace local numbers: layers are counted over the pipeline, experts over the expert-parallel ranks."""
    if match := re.match(r"decoder\.layers\.(\d+)", name):
        decoder: Any = chunk.decoder
        number = decoder.layers[int(match[1])].layer_number - 1
        name = f"decoder.layers.{number}{name[match.end() :]}"
    if match := _EXPERT.search(name):
        of_rank = (chunk.config.num_moe_experts or 0) // chunk.config.expert_model_parallel_size
        number = parallel_state.get_expert_model_parallel_rank() * of_rank + int(match[0])
        name = f"{name[: match.start()]}{number}{name[match.end() :]}"
    return name


def _cutting_group(name: str) -> dist.ProcessGroup:
    """Return the ranks that share a split parameter."""
    return expert_tensor_group() if _EXPERT.search(name) else tensor_group()


class MegatronWeights:
    """The live weights of a model under checkpoint names (see `WeightSource`), in the order of a model of one rank.

    If several ranks share the model, an iteration is a collective: every rank of the world iterates to the end and gets
    every whole tensor in memory that the next tensors overwrite. Besides its own part, a rank holds one bucket (or one
    larger parameter) and one tensor. A rank with the whole model gets views if the packing allows. Parts are sent along
    the pipeline, then between expert ranks, then between tensor-parallel ranks. Each data-parallel copy of the model
    exports separately.

    Args:
        chunks: layers of this rank.
        architecture: architecture of the checkpoint.
        bucket_bytes: size of the parameters that are sent together.
        source: the checkpoint, whose tensors outside the decoder (of images) are exported as they are stored.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        architecture: Architecture,
        bucket_bytes: int = 64 << 20,
        source: Path | None = None,
    ) -> None:
        self._rest = CheckpointReader(source) if source is not None and architecture.prefix else None
        self._chunks = chunks
        self._architecture = architecture
        self._bucket_bytes = bucket_bytes
        self._plan: _Plan | None = None

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        mine = [list(self._own(chunk)) for chunk in self._chunks]
        if self._plan is None:
            self._plan = _make_plan(mine, self._architecture, self._bucket_bytes)
        parameters = {name: parameter for chunk in mine for name, parameter in chunk}
        buffer = torch.empty(self._plan.buffer_bytes, dtype=torch.uint8, device=local_device())
        scratch = torch.empty(self._plan.scratch_bytes, dtype=torch.uint8, device=local_device())

        def laid_out(tensor: Tensor) -> Tensor:
            if tensor.is_contiguous():
                return tensor
            return scratch[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

        for bucket in self._plan.buckets:
            travels = _travels(bucket[0])
            parts = _collect(bucket, parameters, buffer) if travels else [parameters[e.name][None] for e in bucket]
            for entry, part in zip(bucket, parts, strict=True):
                tensors = entry.made_of.unpack(part, self._architecture, laid_out if travels else Tensor.contiguous)
                yield from zip(entry.made_of.hf_names, tensors, strict=True)
        if self._rest is not None:
            dtype = next(self._chunks[0].parameters()).dtype
            for name in sorted(self._rest.names):
                if not name.startswith(self._architecture.prefix):
                    yield name, self._rest.read(name).to(local_device(), dtype)

    def _own(self, chunk: GPTModel) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in global_parameters([chunk]):
            # with tied embeddings a last pipeline stage has a copy
            if name != "output_layer.weight" or not self._architecture.tie_word_embeddings:
                yield name, parameter.detach()


class _Entry(NamedTuple):
    """A parameter of the whole model: its name, its conversion, its shape and dtype on a rank, and its owner.

    `stage` and `expert_rank` are ranks of the pipeline group and of the expert group. All expert ranks have copies of
    parameters outside the experts.
    """

    name: str
    made_of: Recipe
    shape: tuple[int, ...]
    dtype: torch.dtype
    stage: int
    expert_rank: int | None

    @property
    def part_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Plan(NamedTuple):
    """Buckets of an export and their memory, equal on every rank."""

    buckets: list[list[_Entry]]
    buffer_bytes: int
    scratch_bytes: int


def _travels(entry: _Entry) -> bool:
    """Return whether some rank holds only a part of the parameter."""
    between_experts = entry.expert_rank is not None and expert_group().size() > 1
    return pipeline_group().size() > 1 or between_experts or _cutting_group(entry.name).size() > 1


def _make_plan(mine: list[list[tuple[str, Tensor]]], architecture: Architecture, bucket_bytes: int) -> _Plan:
    buckets = list(_buckets(_whole_model(mine, architecture), bucket_bytes))
    buffer_bytes = scratch_bytes = 0

    def measured(tensor: Tensor) -> Tensor:
        nonlocal scratch_bytes
        if not tensor.is_contiguous():
            scratch_bytes = max(scratch_bytes, tensor.nbytes)
        return tensor.contiguous()

    for bucket in buckets:
        if _travels(bucket[0]):
            rows = torch.empty(_rows_shape(bucket), dtype=torch.uint8, device="meta")
            buffer_bytes = max(buffer_bytes, rows.nbytes)
            for entry, part in zip(bucket, _parts(bucket, rows), strict=True):
                for _ in entry.made_of.unpack(part, architecture, measured):
                    pass
    return _Plan(buckets, buffer_bytes, scratch_bytes)


def _whole_model(mine: list[list[tuple[str, Tensor]]], architecture: Architecture) -> list[_Entry]:
    """Return every parameter of the model in the order of one rank; a collective.

    Args:
        mine: names and parameters of this rank, a list for each virtual pipeline stage.
        architecture: architecture of the checkpoint.
    """
    stage, expert_rank = pipeline_group().rank(), expert_group().rank()

    def entry(name: str, part: Tensor) -> _Entry:
        owner = expert_rank if _EXPERT.search(name) else None
        return _Entry(name, recipe(name, architecture), tuple(part.shape), part.dtype, stage, owner)

    entries = [[entry(name, part) for name, part in chunk] for chunk in mine]
    stages = _gathered(entries, pipeline_group())
    # the first virtual stage of every rank comes before the second of any
    in_order = [entry for number in range(len(mine)) for chunks in stages for entry in chunks[number]]
    of_ranks: list[list[_Entry]] = _gathered(in_order, expert_group())
    model: list[_Entry] = []
    for block, positions in itertools.groupby(range(len(in_order)), lambda i: _expert_block(in_order[i].name)):
        places = list(positions)
        # expert ranks differ only in the numbers of their experts
        model += [entries[place] for entries in (of_ranks[:1] if block is None else of_ranks) for place in places]
    return model


def _expert_block(name: str) -> str | None:
    """Return the common key of consecutive experts; None for other parameters."""
    match = _EXPERT.search(name)
    return None if match is None else name[: match.start()]


def _gathered(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    """All-gather the values of the ranks of a group."""
    if group.size() == 1:
        return [mine]
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return found


def _buckets(entries: Sequence[_Entry], limit: int) -> Iterator[list[_Entry]]:
    """Yield consecutive parameters of the same way whose parts of all ranks fit into `limit` bytes."""
    bucket: list[_Entry] = []
    room = limit
    for entry in entries:
        num_bytes = entry.part_bytes * _cutting_group(entry.name).size()
        if bucket and (_way(bucket[0]) != _way(entry) or num_bytes > room):
            yield bucket
            bucket, room = [], limit
        bucket.append(entry)
        room -= num_bytes
    if bucket:
        yield bucket


def _way(entry: _Entry) -> tuple[int, int | None, torch.dtype]:
    """Return source, target and dtype; one dtype per bucket keeps its parameters aligned."""
    return entry.stage, entry.expert_rank, entry.dtype


def _rows_shape(bucket: Sequence[_Entry]) -> tuple[int, int]:
    """Return [R, bytes]: size of the parts of a bucket on each of R tensor-parallel ranks."""
    return _cutting_group(bucket[0].name).size(), sum(entry.part_bytes for entry in bucket)


def _parts(bucket: Sequence[_Entry], rows: Tensor) -> list[Tensor]:
    """Return views [R, ...] of consecutive parameters in rows of bytes; [1, ...] if none is split."""
    parts = []
    for entry, part in zip(bucket, rows.split([entry.part_bytes for entry in bucket], 1), strict=True):
        part = part.view(entry.dtype).unflatten(1, entry.shape)
        parts.append(part[:1] if entry.made_of.split_axis is None else part)
    return parts


def _collect(bucket: Sequence[_Entry], parameters: dict[str, Tensor], buffer: Tensor) -> list[Tensor]:
    """Collect the parts [R, ...] of every parameter of a bucket in `buffer`; a collective.

    Broadcasts fill the buffer in place. Gathering with gloo would need the same amount of memory again.
    """
    stage, expert_rank, _ = _way(bucket[0])
    experts = expert_group() if expert_rank is not None else None
    tensor = _cutting_group(bucket[0].name)
    shape = _rows_shape(bucket)
    rows = buffer[: math.prod(shape)].view(shape)
    own = rows[tensor.rank()]
    if bucket[0].name in parameters:
        for entry, room in zip(bucket, own.split([entry.part_bytes for entry in bucket]), strict=True):
            room.view(entry.dtype).view(entry.shape).copy_(parameters[entry.name])
    if pipeline_group().size() > 1 and (experts is None or experts.rank() == expert_rank):
        dist.broadcast(own, group=pipeline_group(), group_src=stage)
    if experts is not None and experts.size() > 1:
        dist.broadcast(own, group=experts, group_src=expert_rank)
    if tensor.size() > 1:
        for rank, row in enumerate(rows):
            dist.broadcast(row, group=tensor, group_src=rank)
    return _parts(bucket, rows)
