"""Mapping between Hugging Face and megatron-core weights: a table of names and packings.

This module does not import megatron. A megatron parameter packs one to three Hugging Face tensors. Tensor parallelism
splits each of them along at most one axis (query groups stay whole) and packs the shards of a rank like the whole.
Layer and expert numbers are global: pipeline and expert parallelism only rename. Names that differ between families
come from `families.FAMILIES`.

Legend: G query groups (key/value heads), q query heads per group, D head size, H hidden, F intermediate, V vocabulary,
E experts, R tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.checkpoint_shapes import qkv_rows
from roll_gspo.models.families import FAMILIES, ExpertNames, Family

# Layouts of the Hugging Face tensors inside a parameter:
#   single   unchanged
#   vocab    [V, H], padded with zero rows so that all ranks have equally many
#   qkv      per group: its q query heads, its key head, its value head
#   gate_up  gate above up, [2F, H]
Packing = Literal["single", "vocab", "qkv", "gate_up"]

# (Hugging Face name, axis, start, stop) -> that slice of the tensor
ReadSlice = Callable[[str, int, int, int], Tensor]


class Row(NamedTuple):
    """One row of the table. `{}` in the Hugging Face names are filled with the groups of `pattern`.

    `fused` marks a single Hugging Face tensor in which the parts of the packing follow each other.
    """

    pattern: str
    packing: Packing
    split_axis: int | None
    hf_names: tuple[str, ...]
    fused: bool = False


_LAYER, _HF = r"decoder\.layers\.(\d+)\.", "model.layers.{}."

_OF_ALL = (
    Row(r"embedding\.word_embeddings\.weight", "vocab", 0, ("model.embed_tokens.weight",)),
    Row(r"output_layer\.weight", "vocab", 0, ("lm_head.weight",)),
    Row(r"decoder\.final_layernorm\.weight", "single", None, ("model.norm.weight",)),
    Row(_LAYER + r"self_attention\.linear_proj\.weight", "single", 1, (_HF + "self_attn.o_proj.weight",)),
)


@cache
def table(model_type: str) -> tuple[Row, ...]:
    """Return the rows of a family."""
    family = FAMILIES[model_type]
    return (*_OF_ALL, *_norm_rows(family), *_attention_rows(family), *_feed_forward_rows(family))


def _norm_rows(family: Family) -> Iterator[Row]:
    # TransformerEngine fuses a norm into the following projection, which gives the weight a second name
    patterns = (
        r"(?:input_layernorm\.|self_attention\.linear_qkv\.layer_norm_)weight",
        r"self_attention\.linear_proj\.post_layernorm\.weight",
        r"(?:pre_mlp_layernorm\.|mlp\.linear_fc1\.layer_norm_)weight",
        r"mlp\.linear_fc2\.post_layernorm\.weight",
    )
    for pattern, name in zip(patterns, family.norms, strict=True):
        if name is not None:
            yield Row(_LAYER + pattern, "single", None, (f"{_HF}{name}.weight",))


def _attention_rows(family: Family) -> Iterator[Row]:
    names = ("qkv",) if family.fused_qkv else tuple("qkv")
    hf_names = tuple(_HF + f"self_attn.{x}_proj." + "{}" for x in names)
    yield Row(_LAYER + r"self_attention\.linear_qkv\.(weight|bias)", "qkv", 0, hf_names, family.fused_qkv)
    yield Row(_LAYER + r"self_attention\.([qk])_layernorm\.weight", "single", None, (_HF + "self_attn.{}_norm.weight",))


def _feed_forward_rows(family: Family) -> Iterator[Row]:
    if family.experts is None:
        dense, names = _HF + "mlp.", ExpertNames()
        wide = ("gate_up_proj",) if family.fused_gate_up else (names.gate, names.up)
        hf_names = tuple(f"{dense}{name}.weight" for name in wide)
        yield Row(_LAYER + r"mlp\.linear_fc1\.weight", "gate_up", 0, hf_names, family.fused_gate_up)
        yield Row(_LAYER + r"mlp\.linear_fc2\.weight", "single", 1, (f"{dense}{names.down}.weight",))
        return
    names = family.experts
    expert = f"{_HF}{names.module}.experts." + "{}."
    gate_up, down = (
        tuple(f"{expert}{name}.weight" for name in (names.gate, names.up)),
        (f"{expert}{names.down}.weight",),
    )
    yield Row(_LAYER + r"mlp\.router\.weight", "single", None, (f"{_HF}{names.module}.gate.weight",))
    # experts are separate modules, or numbered weights of one grouped matrix product
    for place in (r"local_experts\.(\d+)\.linear_{}\.weight", r"linear_{}\.weight(\d+)"):
        yield Row(_LAYER + r"mlp\.experts\." + place.format("fc1"), "gate_up", 0, gate_up)
        yield Row(_LAYER + r"mlp\.experts\." + place.format("fc2"), "single", 1, down)


@dataclass(frozen=True)
class Recipe:
    """Conversion between one megatron parameter and its Hugging Face tensors.

    Attributes:
        packing: layout of the tensors in the parameter, see `Packing`.
        split_axis: axis of each Hugging Face tensor that tensor parallelism splits; None if every rank holds it all.
        hf_names: the tensors, in packing order.
        fused: the parts of the packing are one tensor of the checkpoint.
    """

    packing: Packing
    split_axis: int | None
    hf_names: tuple[str, ...]
    fused: bool = False

    def shard(
        self,
        read: ReadSlice,
        shapes: Mapping[str, tuple[int, ...]],
        model: Architecture,
        rank: int = 0,
        ranks: int = 1,
    ) -> Tensor:
        """Return the shard of the parameter on `rank` of R = `ranks` tensor-parallel ranks; only its slices are read.

        Args:
            read: reads slices of Hugging Face tensors.
            shapes: shapes of the whole Hugging Face tensors.
            model: the architecture.
            rank: tensor-parallel rank.
            ranks: number of tensor-parallel ranks.
        """
        if self.split_axis is None:
            (name,) = self.hf_names
            return read(name, 0, 0, shapes[name][0])
        pieces = []
        for name, first, length in self._parts(shapes, model):
            step = -(-length // ranks)
            start, stop = min(rank * step, length), min((rank + 1) * step, length)
            pieces.append(read(name, self.split_axis, first + start, first + stop))
        if self.packing == "qkv":
            groups = [piece.unflatten(0, (model.num_key_value_heads // ranks, -1)) for piece in pieces]
            return torch.cat(groups, 1).flatten(0, 1)
        if self.packing == "vocab":
            pieces.append(pieces[0].new_zeros(-(-model.vocab_size // ranks) - len(pieces[0]), model.hidden_size))
        return torch.cat(pieces)

    def _parts(self, shapes: Mapping[str, tuple[int, ...]], model: Architecture) -> Iterator[tuple[str, int, int]]:
        """Yield tensor, first index and length along the split axis of every part of the packing."""
        if not self.fused:
            for name in self.hf_names:
                yield name, 0, shapes[name][self.split_axis or 0]
            return
        (name,) = self.hf_names
        lengths = qkv_rows(model) if self.packing == "qkv" else (model.intermediate_size,) * 2
        for first, length in zip((0, *accumulate(lengths)), lengths, strict=False):
            yield name, first, length

    def unpack(
        self, shards: Tensor, model: Architecture, contiguous: Callable[[Tensor], Tensor] = Tensor.contiguous
    ) -> Iterator[Tensor]:
        """Yield the whole Hugging Face tensors, the inverse of `shard`; views if the layout allows it.

        Args:
            shards: [R, ...] the shard of each rank; R = 1 if the parameter is not split.
            model: the architecture.
            contiguous: copies a tensor that cannot be a view; the copy may be overwritten by the next one.
        """
        if self.packing == "qkv":
            grouped = shards.unflatten(1, (model.num_key_value_heads // len(shards), -1))
            sizes = [grouped.shape[2] - 2 * model.head_dim, model.head_dim, model.head_dim]
            if self.fused:
                yield torch.cat([heads.flatten(0, 2) for heads in grouped.split(sizes, 2)])
                return
            for heads in grouped.split(sizes, 2):
                yield contiguous(heads).flatten(0, 2)
        elif self.packing == "gate_up":
            halves = shards.unflatten(1, (2, -1))
            if self.fused:
                yield contiguous(halves.transpose(0, 1)).flatten(0, 2)
                return
            for half in halves.unbind(1):
                yield contiguous(half).flatten(0, 1)
        else:
            axis = self.split_axis or 0
            whole = contiguous(shards.movedim(0, axis)).flatten(axis, axis + 1)
            yield whole[: model.vocab_size] if self.packing == "vocab" else whole


def recipe(megatron_name: str, model: Architecture) -> Recipe:
    """Return the recipe of a megatron parameter.

    Args:
        megatron_name: name from `named_parameters()`, with global layer and expert numbers.
        model: the architecture, whose family decides the names.

    Raises:
        ConfigError: the table has no row for the parameter.
    """
    for row in table(model.model_type):
        if match := re.fullmatch(row.pattern, megatron_name):
            names = tuple(model.prefix + name.format(*match.groups()) for name in row.hf_names)
            return Recipe(row.packing, row.split_axis, names, row.fused)
    raise ConfigError(
        f"weight mapping: no Hugging Face weight of {model.model_type} for the megatron parameter '{megatron_name}'; "
        "add a row to roll_gspo/models/weight_mapping.py"
    )


class FusedSlice(NamedTuple):
    """Position of a per-expert weight in the fused tensor of transformers 5: `tensor[expert, rows]`."""

    name: str
    expert: int
    half: int | None

    def select(self, expert_rows: Tensor) -> Tensor:
        """Return the weight within `fused[expert]` ([2F, H] gate above up, or [H, F] down)."""
        return expert_rows if self.half is None else expert_rows.chunk(2, 0)[self.half]


def fused_slice(hf_name: str) -> FusedSlice | None:
    """Return the fused slice of `...mlp.experts.{e}.{gate,up,down}_proj.weight`; None for other names."""
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", hf_name)
    if match is None:
        return None
    prefix, expert, kind = match[1], int(match[2]), match[3]
    if kind == "down":
        return FusedSlice(f"{prefix}.down_proj", expert, None)
    return FusedSlice(f"{prefix}.gate_up_proj", expert, ("gate", "up").index(kind))
