from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.weight_mapping import fused_slice, recipe

LAYER = "decoder.layers.3."
NAMES = {
    "embedding.word_embeddings.weight": ["model.embed_tokens.weight"],
    "output_layer.weight": ["lm_head.weight"],
    "decoder.final_layernorm.weight": ["model.norm.weight"],
    LAYER + "input_layernorm.weight": ["model.layers.3.input_layernorm.weight"],
    LAYER + "self_attention.linear_qkv.layer_norm_weight": ["model.layers.3.input_layernorm.weight"],
    LAYER + "pre_mlp_layernorm.weight": ["model.layers.3.post_attention_layernorm.weight"],
    LAYER + "mlp.linear_fc1.layer_norm_weight": ["model.layers.3.post_attention_layernorm.weight"],
    LAYER + "self_attention.linear_qkv.bias": [f"model.layers.3.self_attn.{x}_proj.bias" for x in "qkv"],
    LAYER + "self_attention.q_layernorm.weight": ["model.layers.3.self_attn.q_norm.weight"],
    LAYER + "self_attention.linear_proj.weight": ["model.layers.3.self_attn.o_proj.weight"],
    LAYER + "mlp.linear_fc2.weight": ["model.layers.3.mlp.down_proj.weight"],
    LAYER + "mlp.router.weight": ["model.layers.3.mlp.gate.weight"],
    LAYER + "mlp.experts.local_experts.11.linear_fc1.weight": [
        "model.layers.3.mlp.experts.11.gate_proj.weight",
        "model.layers.3.mlp.experts.11.up_proj.weight",
    ],
    LAYER + "mlp.experts.linear_fc1.weight11": [
        "model.layers.3.mlp.experts.11.gate_proj.weight",
        "model.layers.3.mlp.experts.11.up_proj.weight",
    ],
    LAYER + "mlp.experts.local_experts.0.linear_fc2.weight": ["model.layers.3.mlp.experts.0.down_proj.weight"],
    LAYER + "mlp.experts.linear_fc2.weight0": ["model.layers.3.mlp.experts.0.down_proj.weight"],
}


@pytest.fixture
def model() -> Architecture:
    return of_family("qwen3")


def of_family(model_type: str) -> Architecture:
    """Return an architecture with 6 query heads in 2 groups of size 8."""
    return Architecture(model_type, 4, 24, 20, 6, 2, 8, 13, 64, 1e-6, 1e4, False, None)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_names(name: str) -> None:
    of_experts = ".experts." in name or ".router." in name
    assert list(recipe(name, of_family("qwen3_moe" if of_experts else "qwen3")).hf_names) == NAMES[name]


@pytest.mark.parametrize(
    ("family", "name", "hf_names"),
    [
        ("gemma3_text", "pre_mlp_layernorm.weight", ["pre_feedforward_layernorm.weight"]),
        ("gemma3_text", "self_attention.linear_proj.post_layernorm.weight", ["post_attention_layernorm.weight"]),
        ("gemma3_text", "mlp.linear_fc2.post_layernorm.weight", ["post_feedforward_layernorm.weight"]),
        ("glm4", "self_attention.linear_proj.post_layernorm.weight", ["post_self_attn_layernorm.weight"]),
        ("glm4", "mlp.linear_fc1.weight", ["mlp.gate_up_proj.weight"]),
        ("phi3", "self_attention.linear_qkv.weight", ["self_attn.qkv_proj.weight"]),
        ("mixtral", "mlp.router.weight", ["block_sparse_moe.gate.weight"]),
        (
            "mixtral",
            "mlp.experts.linear_fc1.weight11",
            ["block_sparse_moe.experts.11.w1.weight", "block_sparse_moe.experts.11.w3.weight"],
        ),
        (
            "mixtral",
            "mlp.experts.local_experts.0.linear_fc2.weight",
            ["block_sparse_moe.experts.0.w2.weight"],
        ),
    ],
)
def test_names_of_other_families(family: str, name: str, hf_names: list[str]) -> None:
    found = recipe(LAYER + name, of_family(family)).hf_names
    assert [hf_name.removeprefix("model.layers.3.") for hf_name in found] == hf_names


@pytest.mark.parametrize(
    ("family", "name"), [("qwen3_moe", "mlp.shared_experts.linear_fc1.weight"), ("olmo2", "input_layernorm.weight")]
)
def test_unknown_parameter_is_refused(family: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"weight of {family} .*'{re.escape(LAYER + name)}'"):
        recipe(LAYER + name, of_family(family))


def _parts(name: str, tensors: list[Tensor], model: Architecture, ranks: int) -> Tensor:
    """Return the shard of each rank, [R, ...]."""
    made_of = recipe(name, model)
    named = dict(zip(made_of.hf_names, tensors, strict=True))
    shapes = {hf_name: tuple(tensor.shape) for hf_name, tensor in named.items()}

    def read(hf_name: str, axis: int, start: int, stop: int) -> Tensor:
        return named[hf_name].narrow(axis, start, stop - start)

    return torch.stack([made_of.shard(read, shapes, model, rank, ranks) for rank in range(ranks)])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("family", "name", "shapes", "part"),
    [
        ("phi3", LAYER + "self_attention.linear_qkv.weight", [(80, 24)], (80, 24)),
        ("glm4", LAYER + "mlp.linear_fc1.weight", [(40, 24)], (40, 24)),
        ("qwen3", LAYER + "self_attention.linear_qkv.weight", [(48, 24), (16, 24), (16, 24)], (80, 24)),
        ("qwen3", LAYER + "self_attention.linear_qkv.bias", [(48,), (16,), (16,)], (80,)),
        ("qwen3", LAYER + "self_attention.linear_proj.weight", [(24, 48)], (24, 48)),
        ("qwen3", LAYER + "mlp.linear_fc1.weight", [(20, 24), (20, 24)], (40, 24)),
        ("qwen3", LAYER + "mlp.linear_fc2.weight", [(24, 20)], (24, 20)),
        ("qwen3", "embedding.word_embeddings.weight", [(13, 24)], (13, 24)),
    ],
)
def test_unpack_inverts_shard(
    family: str, name: str, shapes: list[tuple[int, ...]], part: tuple[int, ...], ranks: int
) -> None:
    model = of_family(family)
    tensors = [torch.randn(shape) for shape in shapes]
    parts, axis = _parts(name, tensors, model, ranks), recipe(name, model).split_axis
    assert axis is not None
    want = [-(-part[0] // ranks) * ranks if axis == 0 else part[0], *part[1:]]  # an odd vocabulary is padded
    want[axis] //= ranks
    assert list(parts.shape) == [ranks, *want]
    unpacked = list(recipe(name, model).unpack(parts, model))
    assert all(torch.equal(a, b) for a, b in zip(tensors, unpacked, strict=True))


def test_single_shard_is_unpacked_without_copies(model: Architecture) -> None:
    for name, shape in {LAYER + "mlp.linear_fc1.weight": (40, 24), "decoder.final_layernorm.weight": (24,)}.items():
        parameter = torch.randn(shape)
        for tensor in recipe(name, model).unpack(parameter[None], model):
            assert tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def test_split_axis_gives_each_rank_a_feed_forward_shard(model: Architecture) -> None:
    gate, up, down, x = (torch.randn(shape, dtype=torch.float64) for shape in ((20, 24), (20, 24), (24, 20), (5, 24)))
    whole = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    parts = zip(
        _parts(LAYER + "mlp.linear_fc1.weight", [gate, up], model, 2),
        _parts(LAYER + "mlp.linear_fc2.weight", [down], model, 2),
        strict=True,
    )
    shares = [F.linear(F.silu(F.linear(x, fc1[:10])) * F.linear(x, fc1[10:]), fc2) for fc1, fc2 in parts]
    torch.testing.assert_close(sum(shares), whole)


def test_split_axis_gives_each_rank_whole_query_groups(model: Architecture) -> None:
    query, key, value = torch.randn(48, 24), torch.randn(16, 24), torch.randn(16, 24)
    ranks = _parts(LAYER + "self_attention.linear_qkv.weight", [query, key, value], model, 2)
    for rank, part in enumerate(ranks):
        # 3 query heads, one key head, one value head of size 8
        assert torch.equal(part[:24], query[24 * rank : 24 * (rank + 1)])
        assert torch.equal(part[24:32], key[8 * rank : 8 * (rank + 1)])
        assert torch.equal(part[32:], value[8 * rank : 8 * (rank + 1)])


def test_experts_are_found_in_fused_tensors() -> None:
    prefix = "model.layers.0.mlp.experts"
    gate_up, down = torch.randn(3, 10, 4), torch.randn(3, 4, 5)
    for kind, fused, wanted in (
        ("gate", gate_up, gate_up[2, :5]),
        ("up", gate_up, gate_up[2, 5:]),
        ("down", down, down[2]),
    ):
        place = fused_slice(f"{prefix}.2.{kind}_proj.weight")
        assert place is not None
        assert place.name == f"{prefix}.{'down' if kind == 'down' else 'gate_up'}_proj"
        assert torch.equal(place.select(fused[place.expert]), wanted)
    assert fused_slice("model.layers.0.mlp.gate_proj.weight") is None
