"""Names and shapes of the tensors of a checkpoint, from its architecture alone (no torch)."""

from __future__ import annotations

import math

from roll_gspo.models.architecture import Architecture
from roll_gspo.models.families import ExpertNames

Shapes = dict[str, tuple[int, ...]]


def checkpoint_shapes(model: Architecture) -> Shapes:
    """Return names and shapes of all tensors in a checkpoint of the model, without a tied output head."""
    prefix = model.prefix
    shapes: Shapes = {f"{prefix}model.embed_tokens.weight": (model.vocab_size, model.hidden_size)}
    of_layer = _layer_shapes(model)
    for layer in range(model.num_layers):
        for name, shape in of_layer.items():
            shapes[f"{prefix}model.layers.{layer}.{name}"] = shape
    shapes[f"{prefix}model.norm.weight"] = (model.hidden_size,)
    if not model.tie_word_embeddings:
        shapes[f"{prefix}lm_head.weight"] = (model.vocab_size, model.hidden_size)
    return shapes


def count_parameters(model: Architecture) -> tuple[int, int]:
    """Return the number of parameters of a model, and how many of them are in experts."""
    embeddings = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
    of_layer = sum(math.prod(shape) for shape in _layer_shapes(model).values())
    experts = 0
    if model.experts is not None:
        experts = model.experts.num_experts * 3 * model.hidden_size * model.experts.intermediate_size
    return embeddings + model.num_layers * of_layer + model.hidden_size, model.num_layers * experts


def qkv_rows(model: Architecture) -> tuple[int, int, int]:
    """Return the rows of the query, key and value projections."""
    keys = model.num_key_value_heads * model.head_dim
    return model.num_attention_heads * model.head_dim, keys, keys


def _layer_shapes(model: Architecture) -> Shapes:
    family, hidden = model.family, model.hidden_size
    rows = dict(zip("qkv", qkv_rows(model), strict=True))
    shapes: Shapes = {}
    if family.fused_qkv:
        shapes["self_attn.qkv_proj.weight"] = (sum(rows.values()), hidden)
    else:
        shapes |= {f"self_attn.{x}_proj.weight": (rows[x], hidden) for x in "qkv"}
    shapes["self_attn.o_proj.weight"] = (hidden, rows["q"])
    shapes |= {f"{name}.weight": (hidden,) for name in family.norms if name is not None}
    if model.qkv_bias:
        shapes |= {f"self_attn.{x}_proj.bias": (rows[x],) for x in "qkv"}
    if model.qk_norm:
        shapes |= {f"self_attn.{x}_norm.weight": (size,) for x, size in zip("qk", model.qk_norm_sizes, strict=True)}
    return shapes | _feed_forward_shapes(model)


def _feed_forward_shapes(model: Architecture) -> Shapes:
    hidden, family = model.hidden_size, model.family
    if model.experts is None or family.experts is None:
        if family.fused_gate_up:
            return {
                "mlp.gate_up_proj.weight": (2 * model.intermediate_size, hidden),
                "mlp.down_proj.weight": (hidden, model.intermediate_size),
            }
        return _gated("mlp", ExpertNames(), hidden, model.intermediate_size)
    names = family.experts
    shapes: Shapes = {f"{names.module}.gate.weight": (model.experts.num_experts, hidden)}
    for expert in range(model.experts.num_experts):
        shapes |= _gated(f"{names.module}.experts.{expert}", names, hidden, model.experts.intermediate_size)
    return shapes


def _gated(prefix: str, names: ExpertNames, hidden: int, inner: int) -> Shapes:
    wide = {f"{prefix}.{name}.weight": (inner, hidden) for name in (names.gate, names.up)}
    return wide | {f"{prefix}.{names.down}.weight": (hidden, inner)}
