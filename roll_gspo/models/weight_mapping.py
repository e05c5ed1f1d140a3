"""Mapping between Hugging Face and megatron-core weights: a table of names and packings.

This module does not import megatron. A megatron parameter packs one to three Hugging Face tensors. Tensor parallelism
splits each of them along at most one axis (query groups stay whole) and packs the shards of a rank like the whole.
Layer and expert numbers are global: pipeline and expert parallelism only rename.

Legend: G query groups (key/value heads), q query heads per group, D head size, H hidden, F intermediate, V vocabulary,
E experts, R tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture

# Layouts of the Hugging Face tensors inside a parameter:
#   single   unchanged
#   vocab    [V, H], padded with zero rows so that all ranks have equally many
#   qkv      per group: its q query heads, its key head, its value head
#   gate_up  gate above up, [2F, H]
Packing = Literal["single", "vocab", "qkv", "gate_up"]

# (Hugging Face name, axis, start, stop) -> that slice of the tensor
ReadSlice = Callable[[str, int, int, int], Tensor]


class Row(NamedTuple):
    """One row of the table; `{}` in the Hugging Face names are filled with the groups of `pattern`."""

    pattern: str
    packing: Packing
    split_axis: int | None
    hf_names: tuple[str, ...]


_LAYER, _HF = r"decoder\.layers\.(\d+)\.", "model.layers.{}."
_EXPERT_GATE_UP = tuple(_HF + "mlp.experts.{}." + f"{x}_proj.weight" for x in ("gate", "up"))
_EXPERT_DOWN = (_HF + "mlp.experts.{}.down_proj.weight",)
_QKV = tuple(_HF + f"self_attn.{x}_proj." + "{}" for x in "qkv")

TABLE = (
    Row(r"embedding\.word_embeddings\.weight", "vocab", 0, ("model.embed_tokens.weight",)),
    Row(r"output_layer\.weight", "vocab", 0, ("lm_head.weight",)),
    Row(r"decoder\.final_layernorm\.weight", "single", None, ("model.norm.weight",)),
    # TransformerEngine fuses a norm into the following projection, which gives the weight a second name
    Row(
        _LAYER + r"(?:input_layernorm\.|self_attention\.linear_qkv\.layer_norm_)weight",
        "single",
        None,
        (_HF + "input_layernorm.weight",),
    ),
    Row(
        _LAYER + r"(?:pre_mlp_layernorm\.|mlp\.linear_fc1\.layer_norm_)weight",
        "single",
        None,
        (_HF + "post_attention_layernorm.weight",),
    ),
    Row(_LAYER + r"self_attention\.linear_qkv\.(weight|bias)", "qkv", 0, _QKV),
    Row(_LAYER + r"self_attention\.([qk])_layernorm\.weight", "single", None, (_HF + "self_attn.{}_norm.weight",)),
    Row(_LAYER + r"self_attention\.linear_proj\.weight", "single", 1, (_HF + "self_attn.o_proj.weight",)),
    Row(
        _LAYER + r"mlp\.linear_fc1\.weight",
        "gate_up",
        0,
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
    ),
    Row(_LAYER + r"mlp\.linear_fc2\.weight", "single", 1, (_HF + "mlp.down_proj.weight",)),
    Row(_LAYER + r"mlp\.router\.weight", "single", None, (_HF + "mlp.gate.weight",)),
    # experts are separate modules, or numbered weights of one grouped matrix product
    Row(_LAYER + r"mlp\.experts\.local_experts\.(\d+)\.linear_fc1\.weight", "gate_up", 0, _EXPERT_GATE_UP),
    Row(_LAYER + r"mlp\.experts\.linear_fc1\.weight(\d+)", "gate_up", 0, _EXPERT_GATE_UP),
    Row(_LAYER + r"mlp\.experts\.local_experts\.(\d+)\.linear_fc2\.weight", "single", 1, _EXPERT_DOWN),
    Row(_LAYER + r"mlp\.experts\.linear_fc2\.weight(\d+)", "single", 1, _EXPERT_DOWN),
)


@dataclass(frozen=True)
class Recipe:
    """Conversion between one megatron parameter and its Hugging Face tensors.

    Attributes:
        packing: layout of the tensors in the parameter, see `Packing`.
        split_axis: axis of each Hugging Face tensor that tensor parallelism splits; None if every rank holds it all.
        hf_names: the tensors, in packing order.
    """

    packing: Packing
    split_axis: int | None
    hf_names: tuple[str, ...]

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
        for name in self.hf_names:
            length = shapes[name][self.split_axis]
            step = -(-length // ranks)
            pieces.append(read(name, self.split_axis, min(rank * step, length), min((rank + 1) * step, length)))
        if self.packing == "qkv":
            groups = [piece.unflatten(0, (model.num_key_value_heads // ranks, -1)) for piece in pieces]
            return torch.cat(groups, 1).flatten(0, 1)
        if self.packing == "vocab":
            pieces.append(pieces[0].new_zeros(-(-model.vocab_size // ranks) - len(pieces[0]), model.hidden_size))
        return torch.cat(pieces)

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
            for heads in grouped.split(sizes, 2):
                yield contiguous(heads).flatten(0, 2)
        elif self.packing == "gate_up":
            for half in shards.unflatten(1, (2, -1)).unbind(1):
                yield contiguous(half).flatten(0, 1)
        else:
            axis = self.split_axis or 0
            whole = contiguous(shards.movedim(0, axis)).flatten(axis, axis + 1)
            yield whole[: model.vocab_size] if self.packing == "vocab" else whole


def recipe(megatron_name: str) -> Recipe:
    """Return the recipe of a megatron parameter.

    Args:
        megatron_name: name from `named_parameters()`, with global layer and expert numbers.

    Raises:
        ConfigError: the table has no row for the parameter.
    """
    for row in TABLE:
        if match := re.fullmatch(row.pattern, megatron_name):
            names = tuple(name.format(*match.groups()) for name in row.hf_names)
            return Recipe(row.packing, row.split_axis, names)
    raise ConfigError(
        f"weight mapping: no Hugging Face weight for the megatron parameter '{megatron_name}'; "
        "add a row to roll_gspo/models/weight_mapping.py"
    )


def checkpoint_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors in a checkpoint of the model, without a tied output head."""
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    attention: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, heads),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if model.qkv_bias:
        attention |= {f"self_attn.{x}_proj.bias": (heads if x == "q" else keys,) for x in "qkv"}
    if model.qk_norm:
        attention |= {f"self_attn.{x}_norm.weight": (model.head_dim,) for x in "qk"}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        for name, shape in (attention | _feed_forward_shapes(model)).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def _feed_forward_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    def swiglu(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
        wide = {f"{prefix}.{x}_proj.weight": (inner, model.hidden_size) for x in ("gate", "up")}
        return wide | {f"{prefix}.down_proj.weight": (model.hidden_size, inner)}

    if model.experts is None:
        return swiglu("mlp", model.intermediate_size)
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (model.experts.num_experts, model.hidden_size)}
    for expert in range(model.experts.num_experts):
        shapes |= swiglu(f"mlp.experts.{expert}", model.experts.intermediate_size)
    return shapes


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
