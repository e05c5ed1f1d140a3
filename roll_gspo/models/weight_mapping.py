"""Hugging Face weights <-> megatron-core weights: one table of names, and how whole tensors are packed.

Nothing here imports megatron. A megatron parameter is packed from one to three Hugging Face tensors. The packed tensor
has at most one axis that tensor parallelism cuts: the part of a rank is `packed.chunk(tp, cut_axis)[rank]`, reshaped to
the parameter; export is the reverse. Layer and expert numbers are global: pipeline and expert parallelism only rename.

Legend: G query groups (key/value heads), q query heads a group, D head size, H hidden, F intermediate, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture

# How the Hugging Face tensors of one parameter lie in it:
#   single   as they are
#   vocab    [V, H], rows may be padded
#   qkv      group by group: its q query heads, its key head, its value head
#   gate_up  [2, F, H]: gate and up stacked, so that one cut of F gives a rank its share of both
Packing = Literal["single", "vocab", "qkv", "gate_up"]


class Row(NamedTuple):
    """One line of the table; `{}` in the Hugging Face names take the groups of `pattern`."""

    pattern: str
    packing: Packing
    cut_axis: int | None
    hf_names: tuple[str, ...]


_LAYER, _HF = r"decoder\.layers\.(\d+)\.", "model.layers.{}."
_EXPERT_GATE_UP = tuple(_HF + "mlp.experts.{}." + f"{x}_proj.weight" for x in ("gate", "up"))
_EXPERT_DOWN = (_HF + "mlp.experts.{}.down_proj.weight",)
_QKV = tuple(_HF + f"self_attn.{x}_proj." + "{}" for x in "qkv")

TABLE = (
    Row(r"embedding\.word_embeddings\.weight", "vocab", 0, ("model.embed_tokens.weight",)),
    Row(r"output_layer\.weight", "vocab", 0, ("lm_head.weight",)),
    Row(r"decoder\.final_layernorm\.weight", "single", None, ("model.norm.weight",)),
    # TransformerEngine fuses a norm into the projection after it: the second name of the same weight
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
        1,
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
    ),
    Row(_LAYER + r"mlp\.linear_fc2\.weight", "single", 1, (_HF + "mlp.down_proj.weight",)),
    Row(_LAYER + r"mlp\.router\.weight", "single", None, (_HF + "mlp.gate.weight",)),
    # experts as modules of their own, or as numbered weights of one grouped matrix product
    Row(_LAYER + r"mlp\.experts\.local_experts\.(\d+)\.linear_fc1\.weight", "gate_up", 1, _EXPERT_GATE_UP),
    Row(_LAYER + r"mlp\.experts\.linear_fc1\.weight(\d+)", "gate_up", 1, _EXPERT_GATE_UP),
    Row(_LAYER + r"mlp\.experts\.local_experts\.(\d+)\.linear_fc2\.weight", "single", 1, _EXPERT_DOWN),
    Row(_LAYER + r"mlp\.experts\.linear_fc2\.weight(\d+)", "single", 1, _EXPERT_DOWN),
)


@dataclass(frozen=True)
class Recipe:
    """How one megatron parameter is made of Hugging Face tensors.

    Attributes:
        packing: see `Packing`.
        cut_axis: the axis of the packed tensor that tensor parallelism cuts; None where every rank has all of it.
        hf_names: the tensors, in packing order.
    """

    packing: Packing
    cut_axis: int | None
    hf_names: tuple[str, ...]

    def pack(self, tensors: Sequence[Tensor], model: Architecture, vocab_rows: int) -> Tensor:
        """Whole Hugging Face tensors -> the whole packed tensor; flatten its first axes to the parameter's shape.

        Args:
            tensors: in the order of `hf_names`.
            model: gives the number of query groups.
            vocab_rows: rows of the megatron embedding, at least V; further rows are zero.
        """
        if self.packing == "qkv":
            groups = [t.reshape(model.num_key_value_heads, -1, *t.shape[1:]) for t in tensors]
            return torch.cat(groups, 1).flatten(0, 1)
        if self.packing == "gate_up":
            return torch.stack(tuple(tensors))
        (tensor,) = tensors
        if self.packing == "vocab" and tensor.shape[0] < vocab_rows:
            padding = tensor.new_zeros(vocab_rows - tensor.shape[0], *tensor.shape[1:])
            return torch.cat([tensor, padding])
        return tensor

    def unpack(self, packed: Tensor, model: Architecture) -> list[Tensor]:
        """The reverse of `pack`, also from the parameter's own (flattened) shape; results may be views."""
        if self.packing == "qkv":
            grouped = packed.view(model.num_key_value_heads, -1, *packed.shape[1:])
            sizes = [grouped.shape[1] - 2 * model.head_dim, model.head_dim, model.head_dim]
            return [part.flatten(0, 1) for part in grouped.split(sizes, 1)]
        if self.packing == "gate_up":
            return list(packed.view(2, -1, packed.shape[-1]).unbind(0))
        return [packed[: model.vocab_size]] if self.packing == "vocab" else [packed]


def recipe(megatron_name: str) -> Recipe:
    """The recipe of a megatron parameter.

    Args:
        megatron_name: as in `named_parameters()`, with global layer and expert numbers.

    Raises:
        ConfigError: the parameter belongs to a kind of model that is not in the table.
    """
    for row in TABLE:
        if match := re.fullmatch(row.pattern, megatron_name):
            names = tuple(name.format(*match.groups()) for name in row.hf_names)
            return Recipe(row.packing, row.cut_axis, names)
    raise ConfigError(
        f"weight mapping: no Hugging Face weight is known for the megatron parameter '{megatron_name}'; "
        "add a row to roll_gspo/models/weight_mapping.py"
    )


class FusedSlice(NamedTuple):
    """Where a per-expert weight lies in the fused tensor of transformers 5: `tensor[expert, rows]`."""

    name: str
    expert: int
    half: int | None

    def cut(self, expert_rows: Tensor) -> Tensor:
        """The weight out of `fused[expert]` ([2F, H] gate over up, or [H, F] down)."""
        return expert_rows if self.half is None else expert_rows.chunk(2, 0)[self.half]


def fused_slice(hf_name: str) -> FusedSlice | None:
    """Where transformers 5 keeps `...mlp.experts.{e}.{gate,up,down}_proj.weight` in memory; None for other names."""
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", hf_name)
    if match is None:
        return None
    prefix, expert, kind = match[1], int(match[2]), match[3]
    if kind == "down":
        return FusedSlice(f"{prefix}.down_proj", expert, None)
    return FusedSlice(f"{prefix}.gate_up_proj", expert, ("gate", "up").index(kind))


def split_fused(name: str, fused: Tensor) -> list[tuple[str, Tensor]]:
    """`(checkpoint name, view)` of every expert of a fused tensor; other tensors come back as they are.

    Args:
        name: `...mlp.experts.gate_up_proj` ([E, 2F, H]) or `...mlp.experts.down_proj` ([E, H, F]).
        fused: its tensor.
    """
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up|down)_proj", name)
    if match is None:
        return [(name, fused)]
    prefix, kind = match.groups()
    if kind == "down":
        return [(f"{prefix}.{e}.down_proj.weight", weight) for e, weight in enumerate(fused)]
    halves = [(e, weight.chunk(2, 0)) for e, weight in enumerate(fused)]
    return [
        (f"{prefix}.{e}.{part}_proj.weight", half)
        for e, pair in halves
        for part, half in zip(("gate", "up"), pair, strict=True)
    ]
