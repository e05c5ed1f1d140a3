"""Every parallel layout computes what one process computes: scores, losses, gradient norms, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import imitated, replayed, trained, valued
from ranks import Ranks
from tiny_models import write_model

from roll_gspo.strategies.micro_batches import MicroBatching

pytestmark = pytest.mark.megatron

Layout = dict[str, Any]
TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
SP, DISTRIBUTED, PACKED = "sequence_parallel", "use_distributed_optimizer", "use_sequence_packing"
RECOMPUTED: Layout = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
DENSE: dict[str, tuple[int, Layout]] = {
    "packed": (1, {PACKED: True}),
    "tp2": (2, {TP: 2}),
    "tp2_sp": (2, {TP: 2, SP: True}),
    "tp2_sp_packed_recomputed": (2, {TP: 2, SP: True, PACKED: True, **RECOMPUTED}),
    "pp2": (2, {PP: 2}),
    "pp2_packed": (2, {PP: 2, PACKED: True}),
    "pp2_vpp2": (2, {PP: 2, VPP: 2}),
    "cp2": (2, {CP: 2}),
    "cp2_packed": (2, {CP: 2, PACKED: True}),
    "dp2": (2, {}),
    "dp2_distributed_optimizer": (2, {DISTRIBUTED: True}),
    "dp2_overlapped": (2, {DISTRIBUTED: True, "overlap_grad_reduce": True}),
    "dp2_gathered_late": (2, {DISTRIBUTED: True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "dp2_packed_fused": (2, {PACKED: True, "bias_activation_fusion": True, "bias_dropout_fusion": True}),
    "tp2_dp2": (4, {TP: 2}),
    "cp2_tp2_sp_packed": (4, {CP: 2, TP: 2, SP: True, PACKED: True}),
    "pp2_dp2_distributed_optimizer": (4, {PP: 2, DISTRIBUTED: True}),
}
MOE: dict[str, tuple[int, Layout]] = {
    "ep2": (2, {EP: 2}),
    "ep2_distributed_optimizer": (2, {EP: 2, DISTRIBUTED: True}),
    "ep2_packed": (2, {EP: 2, PACKED: True, "bias_activation_fusion": True, "bias_dropout_fusion": True}),
    "tp2_sp_allgather": (2, {TP: 2, SP: True, "moe_token_dispatcher_type": "allgather"}),
    "tp2_sp": (2, {TP: 2, SP: True}),
    "tp2_sp_ep2": (2, {TP: 2, SP: True, EP: 2, ETP: 1}),
    "pp2": (2, {PP: 2}),
    "pp2_vpp2": (2, {PP: 2, VPP: 2}),
    "cp2": (2, {CP: 2}),
    "dp2": (2, {}),
    "pp2_ep2": (4, {PP: 2, EP: 2}),
}
# Layouts whose settings all occur in another case; they run with `long`.
COVERED = {
    *(("dense", name) for name in ("tp2_sp", "pp2", "pp2_packed", "cp2", "tp2_dp2", "dp2_distributed_optimizer")),
    *(("moe", name) for name in ("ep2", "tp2_sp", "pp2")),
}
CASES = [
    pytest.param(kind, name, marks=[pytest.mark.long] if (kind, name) in COVERED else [])
    for kind, layouts in (("dense", DENSE), ("moe", MOE))
    for name in layouts
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = {"dense": "four_layers", "moe": "four_layers_moe"}
    return {kind: write_model(tmp_path_factory.mktemp(kind), family) for kind, family in families.items()}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], ranks: Ranks) -> dict[str, dict[str, Any]]:
    return {kind: ranks.run(1, trained, folder, {})[0] for kind, folder in folders.items()}


def check_same(got: dict[str, Any], want: dict[str, Any], rel: float = 1e-5, score: float = 1e-4) -> None:
    for mine, other in zip(got["scores"], want["scores"], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=score)
    for step, (mine, other) in enumerate(zip(got["updates"], want["updates"], strict=True)):
        assert mine == pytest.approx(other, rel=rel, abs=1e-6), step
    for mine, other in zip(got["metrics"], want["metrics"], strict=True):
        assert mine == pytest.approx(other, rel=rel)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_layout_computes_what_one_process_computes(
    folders: dict[str, Path], alone: dict[str, dict[str, Any]], ranks: Ranks, kind: str, name: str
) -> None:
    world_size, layout = (DENSE if kind == "dense" else MOE)[name]
    for got in ranks.run(world_size, trained, folders[kind], layout):
        check_same(got, alone[kind])
        assert got["weights"].keys() == alone[kind]["weights"].keys()
        for weight, want in alone[kind]["weights"].items():
            torch.testing.assert_close(got["weights"][weight], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [{}, {PACKED: True}], ids=["padded", "packed"])
def test_dynamic_batching_changes_no_number(
    folders: dict[str, Path], alone: dict[str, dict[str, Any]], ranks: Ranks, layout: Layout
) -> None:
    """Passes of at most 24 tokens, on one rank and on two."""
    batching = MicroBatching(2, max_tokens=24, packed=PACKED in layout)
    for world_size in (1, 2):
        for got in ranks.run(world_size, trained, folders["dense"], layout, torch.float32, batching):
            check_same(got, alone["dense"])


@pytest.mark.parametrize("layout", [{TP: 2, SP: True}, {PP: 2}, {CP: 2}, {}], ids=["tp2_sp", "pp2", "cp2", "dp2"])
def test_critic_computes_what_one_process_computes(folders: dict[str, Path], ranks: Ranks, layout: Layout) -> None:
    (want,) = ranks.run(1, valued, folders["dense"], {})
    assert want["scores"][0].abs().max() > 1e-3
    for got in ranks.run(2, valued, folders["dense"], layout):
        check_same(got, want)


@pytest.mark.parametrize(
    "layout", [{TP: 2, SP: True}, {PP: 2}, {CP: 2, PACKED: True}, {}], ids=["tp2_sp", "pp2", "cp2_packed", "dp2"]
)
def test_masks_with_gaps_are_those_of_one_process(folders: dict[str, Path], ranks: Ranks, layout: Layout) -> None:
    (want,) = ranks.run(1, imitated, folders["dense"], {})
    for got in ranks.run(2, imitated, folders["dense"], layout):
        check_same(got, want)


@pytest.mark.parametrize("layout", [{}, {EP: 2}], ids=["dp2", "ep2"])
def test_replay_uses_the_experts_of_one_process(folders: dict[str, Path], ranks: Ranks, layout: Layout) -> None:
    (want,) = ranks.run(1, replayed, folders["moe"], {})
    assert want["metrics"][0]["routing/replayed_fraction"] == 1
    for got in ranks.run(2, replayed, folders["moe"], layout):
        assert torch.equal(got["scores"][0].sort(-1).values, want["scores"][0].sort(-1).values)
        check_same({**got, "scores": []}, {**want, "scores": []})


@pytest.mark.parametrize(
    "layout",
    [{TP: 2, SP: True}, {PP: 2}, {DISTRIBUTED: True, "grad_reduce_in_fp32": False}],
    ids=["tp2_sp", "pp2", "dp2"],
)
def test_bfloat16_layouts_differ_by_rounding_only(folders: dict[str, Path], ranks: Ranks, layout: Layout) -> None:
    (want,) = ranks.run(1, trained, folders["dense"], {}, torch.bfloat16)
    for got in ranks.run(2, trained, folders["dense"], layout, torch.bfloat16):
        check_same(got, want, rel=0.05, score=1.0)
