"""A training state of the FSDP2 engine goes on with as many ranks bit for bit, with others to the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from state_cases import Layout, converted, failing_save, refused, resumed, saved, tensors_by_torch, unchanged_by_refusal
from tiny_models import write_model

FSDP2: Layout = {"engine": "fsdp2"}
KEPT: Layout = {**FSDP2, "reshard_after_forward": False}
OTHER_SIZES = [1, *(pytest.param(size, marks=pytest.mark.long) for size in (3, 4))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = {"dense": "qwen3_tied", "moe": "qwen3_moe", "deeper": "four_layers"}
    return {kind: write_model(tmp_path_factory.mktemp(kind), family) for kind, family in families.items()}


@pytest.fixture(scope="module")
def state_of_two(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, ranks: Ranks
) -> tuple[Path, dict[str, Any]]:
    """A state that two ranks wrote while they trained, and what they computed next, resumed or not, bit for bit."""
    state = tmp_path_factory.mktemp("two") / "state"
    return state, ranks.run(2, saved, models["dense"], FSDP2, state, torch.float32, False, True)[0]


def check_goes_on(got: dict[str, Any], want: dict[str, Any], rel: float = 1e-5) -> None:
    for mine, other in zip(got["updates"], want["updates"], strict=True):
        assert mine == pytest.approx(other, rel=rel, abs=1e-6)
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=rel)


@pytest.mark.parametrize("world_size", OTHER_SIZES)
def test_state_goes_on_with_another_number_of_ranks(
    models: dict[str, Path], state_of_two: tuple[Path, dict[str, Any]], ranks: Ranks, world_size: int
) -> None:
    state, want = state_of_two
    for got in ranks.run(world_size, resumed, models["dense"], KEPT, state):
        check_goes_on(got, want)


def test_no_bit_changes_on_the_way_through_other_numbers_of_ranks(
    models: dict[str, Path], state_of_two: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: Ranks
) -> None:
    """Read and written again by 1 and 4 ranks, each whole float32 tensor is the one that two wrote first."""
    state = state_of_two[0]
    for world_size in (1, 4):
        ranks.run(world_size, converted, models["dense"], FSDP2, state, tmp_path / str(world_size))
        state = tmp_path / str(world_size)
    assert len(list(state.glob("*.distcp"))) == 4
    want, got = tensors_by_torch(state_of_two[0], tmp_path), tensors_by_torch(state, tmp_path)
    assert got.keys() == want.keys()
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert tuple(want[f"{kind}.model.embed_tokens.weight"].shape) == (61, 64)
    for name, tensor in want.items():
        assert tensor.dtype == torch.float32 and bool(tensor.any()), name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "layout", "dtype", "critic", "readers"),
    [
        ("dense", FSDP2, torch.float32, True, 1),
        pytest.param("moe", FSDP2, torch.float32, False, 1, marks=pytest.mark.long),
        pytest.param("dense", FSDP2, torch.bfloat16, False, 4, marks=pytest.mark.long),
        pytest.param("dense", {**FSDP2, "cpu_offload": True}, torch.float32, False, 1, marks=pytest.mark.long),
    ],
    ids=["critic", "experts", "bfloat16", "on the host"],
)
def test_other_engines_go_on(
    models: dict[str, Path],
    tmp_path: Path,
    ranks: Ranks,
    kind: str,
    layout: Layout,
    dtype: torch.dtype,
    critic: bool,
    readers: int,
) -> None:
    """Resume with two ranks bit for bit, and with another number to rounding."""
    state = tmp_path / "state"
    want = ranks.run(2, saved, models[kind], layout, state, dtype, critic)[0]
    for got in ranks.run(readers, resumed, models[kind], FSDP2, state, dtype, critic):
        check_goes_on(got, want, rel=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.long), True])
def test_save_that_fails_on_one_rank_fails_on_all_and_can_be_repeated(
    models: dict[str, Path], tmp_path: Path, ranks: Ranks, asynchronous: bool
) -> None:
    answers = ranks.run(2, failing_save, models["dense"], FSDP2, tmp_path, asynchronous)
    for first, second, numbers in answers:
        assert first.startswith(f"{tmp_path / 'first'}: cannot be written (rank 1: [Errno 27] File too large")
        assert second == "saved"
        assert bool(numbers) == asynchronous
    assert not (tmp_path / "first/manifest.json").exists()


def test_refused_state_changes_no_rank(
    models: dict[str, Path], state_of_two: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: Ranks
) -> None:
    """Rank 1 finds that its file is cut short. Both ranks report it, and train on as before."""
    state = tmp_path / "state"
    shutil.copytree(state_of_two[0], state)
    (damaged := state / "__1_0.distcp").write_bytes(damaged.read_bytes()[:-10])
    messages = ranks.run(2, unchanged_by_refusal, models["dense"], FSDP2, state, state_of_two[0])
    assert len(set(messages)) == 1 and "__1_0.distcp: has" in messages[0] and "cut short" in messages[0]


def test_foreign_states_are_refused(
    models: dict[str, Path], state_of_two: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: Ranks
) -> None:
    state = tmp_path / "state"
    shutil.copytree(state_of_two[0], state)
    (said,) = ranks.run(1, refused, models["deeper"], FSDP2, state)
    assert "manifest.json: parameters of another model ('model.layers.0.self_attn.q_proj.weight' has shape" in said
    manifest = state / "manifest.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "format": document["format"] + 1}))
    (said,) = ranks.run(1, refused, models["dense"], FSDP2, state)
    assert said.startswith(f"{manifest}: format 2 is not known here (this version reads 1); a newer roll_gspo wrote")
    manifest.write_text(json.dumps({**document, "engine": "megatron"}))
    (said,) = ranks.run(1, refused, models["dense"], FSDP2, state)
    assert said.startswith(f"{manifest}: written by the engine megatron, not fsdp2; resume with the strategy_name that")
    (said,) = ranks.run(1, refused, models["dense"], FSDP2, tmp_path)
    assert said.startswith(f"{tmp_path / 'manifest.json'}: no such file; the checkpoint is of another strategy")


@pytest.mark.megatron
def test_megatron_refuses_a_state_of_fsdp2(
    models: dict[str, Path], state_of_two: tuple[Path, dict[str, Any]], ranks: Ranks
) -> None:
    (said,) = ranks.run(1, refused, models["dense"], {}, state_of_two[0])
    assert "written by the engine fsdp2, not megatron; resume with the strategy_name that wrote it" in said


def test_state_without_optimizer_is_refused(models: dict[str, Path], tmp_path: Path, ranks: Ranks) -> None:
    """Weights of no step, which say that they are of three."""
    ranks.run(1, _untrained, models["dense"], tmp_path / "state")
    manifest = tmp_path / "state/manifest.json"
    manifest.write_text(manifest.read_text().replace('"applied_steps": 0', '"applied_steps": 3'))
    (said,) = ranks.run(1, refused, models["dense"], FSDP2, tmp_path / "state")
    assert said.startswith(f"{tmp_path / 'state'}: holds no optimizer state ('exp_avg' is not there); resume from")


def _untrained(model: Path, state: Path) -> None:
    from state_cases import engine_of, made

    made(state)
    engine_of(model, FSDP2).save(state)
