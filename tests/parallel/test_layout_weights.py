"""Checkpoint -> megatron at any layout -> checkpoint: the same names, order and bits on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file
from tiny_models import build_model, write_model
from weight_cases import changed, exported, exported_grouped, exported_memory, refused, saved

pytestmark = pytest.mark.megatron

Layout = dict[str, Any]
TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, EP, ETP, SP = (
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
)
DENSE = ("qwen2", "qwen3_tied", "qwen3_untied", "llama")
MOE = ("qwen3_moe",)
DEEP = ("four_layers", "four_layers_moe")
CASES: dict[str, tuple[tuple[str, ...], int, Layout]] = {
    "dense_tp2": (DENSE, 2, {TP: 2}),
    "dense_tp2_sp": (DENSE, 2, {TP: 2, SP: True}),
    "dense_pp2": (DENSE, 2, {PP: 2}),
    "dense_cp2": (DENSE, 2, {CP: 2}),
    "dense_dp2": (DENSE, 2, {}),
    "dense_tp2_dp2": (DENSE, 4, {TP: 2}),
    "dense_tp2_pp2": (DENSE, 4, {TP: 2, PP: 2}),
    "dense_tp4": (("four_groups",), 4, {TP: 4}),  # 61 rows of vocabulary become 64
    "deep_pp2_vpp2": (DEEP, 2, {PP: 2, VPP: 2}),
    "deep_pp4": (DEEP, 4, {PP: 4}),
    "moe_ep2": (MOE, 2, {EP: 2}),
    "moe_pp2": (MOE, 2, {PP: 2}),
    "moe_dp2": (MOE, 2, {}),
    "moe_tp2_etp2": (MOE, 2, {TP: 2, SP: True, ETP: 2}),
    "moe_tp2_ep2_etp1": (MOE, 2, {TP: 2, SP: True, EP: 2, ETP: 1}),
    "moe_pp2_ep2": (MOE, 4, {PP: 2, EP: 2}),
    "moe_ep4": (MOE, 4, {EP: 4}),
    "moe_ep2_dp2": (MOE, 4, {EP: 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: write_model(tmp_path_factory.mktemp(family), family)
        for family in {f for case in CASES.values() for f in case[0]}
    }


@pytest.fixture(scope="module")
def order(ranks: Ranks, folders: dict[str, Path]) -> dict[str, list[str]]:
    """The names that one process exports."""
    (names,) = ranks.run(1, exported, list(folders.values()), {}, torch.float32, 1 << 20)
    return dict(zip(folders, names, strict=True))


# float32 in buckets that hold a layer, bfloat16 in buckets that hold a matrix or less
BUCKETS = [(torch.float32, 1 << 20), (torch.bfloat16, 10_000)]


# Every layout runs with one of the two; the other runs with `long`.
@pytest.mark.parametrize(
    ("case", "dtype", "bucket_bytes"),
    [
        pytest.param(case, *bucket, marks=[] if (number + index) % 2 == 0 else pytest.mark.long)
        for number, case in enumerate(CASES)
        for index, bucket in enumerate(BUCKETS)
    ],
)
def test_models_come_back_bit_for_bit(
    ranks: Ranks,
    folders: dict[str, Path],
    order: dict[str, list[str]],
    case: str,
    dtype: torch.dtype,
    bucket_bytes: int,
) -> None:
    families, world_size, layout = CASES[case]
    results = ranks.run(world_size, exported, [folders[family] for family in families], layout, dtype, bucket_bytes)
    assert results == [[order[family] for family in families]] * world_size


def test_experts_of_grouped_products_come_back_in_order(ranks: Ranks, folders: dict[str, Path]) -> None:
    (want,) = ranks.run(1, exported_grouped, folders["four_layers_moe"], {})
    assert ranks.run(4, exported_grouped, folders["four_layers_moe"], {PP: 2, EP: 2}) == [want] * 4


def test_an_export_gives_the_weights_of_now(ranks: Ranks, folders: dict[str, Path]) -> None:
    (want,) = ranks.run(1, changed, folders["four_layers_moe"], {})
    for got in ranks.run(4, changed, folders["four_layers_moe"], {PP: 2, EP: 2}):
        assert got == want


@pytest.mark.parametrize("bucket_bytes", [40_000, 1000])
@pytest.mark.parametrize(
    "layout", [{TP: 2, SP: True}, {PP: 2}, {TP: 2, SP: True, EP: 2, ETP: 1}], ids=["tp2", "pp2", "tp2_ep2"]
)
def test_an_export_takes_one_bucket_and_one_tensor(
    ranks: Ranks, folders: dict[str, Path], layout: Layout, bucket_bytes: int
) -> None:
    folder = folders["four_layers_moe"]
    for peak, bound in ranks.run(2, exported_memory, folder, layout, bucket_bytes, False):
        assert bucket_bytes < peak <= bound < 150_000
    whole = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    for peak, _ in ranks.run(2, exported_memory, folder, layout, bucket_bytes, True):
        assert peak > whole > 600_000


@pytest.mark.parametrize(
    ("family", "world_size", "layout"),
    [("four_layers", 2, {TP: 2}), ("four_layers_moe", 4, {PP: 2, EP: 2})],
    ids=["tp2", "pp2_ep2"],
)
def test_ranks_write_one_checkpoint(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path, family: str, world_size: int, layout: Layout
) -> None:
    source = folders[family]
    assert ranks.run(world_size, saved, source, layout, tmp_path, None) == [None] * world_size
    want, got = (load_file(folder / "model.safetensors") for folder in (source, tmp_path))
    assert got.keys() == want.keys() and all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in source.iterdir()}


def test_every_rank_hears_of_a_disk_that_is_full(ranks: Ranks, folders: dict[str, Path], tmp_path: Path) -> None:
    for error in ranks.run(2, saved, folders["four_layers"], {PP: 2}, tmp_path, 100_000):
        assert error is not None and "the model cannot be written" in error
    assert not list(tmp_path.iterdir())


def test_fused_experts_are_cut_like_others(ranks: Ranks, folders: dict[str, Path], tmp_path: Path) -> None:
    """Fused experts: transformers 5 keeps them in memory like this, and some checkpoints store them like this."""
    fused = {name: tensor.detach().clone() for name, tensor in build_model("qwen3_moe").named_parameters()}
    save_file(fused, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["qwen3_moe"] / "config.json").read_text())
    for layout in ({EP: 2}, {TP: 2, SP: True, ETP: 2}):
        got, want = (ranks.run(2, changed, folder, layout) for folder in (tmp_path, folders["qwen3_moe"]))
        assert got == want


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model.layers.3.self_attn.o_proj.bias": torch.zeros(64)}, "layers.3.self_attn.o_proj.bias"),
        ({"model.layers.3.mlp.down_proj.weight": torch.zeros(64, 100)}, "(64, 100)"),
        ({"model.layers.0.mlp.down_proj.weight": None}, "no tensor 'model.layers.0.mlp.down_proj.weight'"),
    ],
    ids=["unknown", "misshapen", "missing"],
)
def test_every_rank_refuses_what_one_would_not_read(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path, change: dict[str, torch.Tensor | None], why: str
) -> None:
    weights = load_file(folders["four_layers"] / "model.safetensors") | change
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["four_layers"] / "config.json").read_text())
    for error in ranks.run(2, refused, tmp_path, {PP: 2}):
        assert why in error
