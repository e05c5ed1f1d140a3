"""A training state goes on in the layout that wrote it bit for bit, and in every other to the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from state_cases import Layout, converted, failing_save, refused, resumed, saved, timed_save, whole_tensors
from tiny_models import write_model

pytestmark = pytest.mark.megatron

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
EP, ETP, CP = "expert_model_parallel_size", "expert_tensor_parallel_size", "context_parallel_size"
SP, DISTRIBUTED = "sequence_parallel", "use_distributed_optimizer"
LAYOUTS: dict[str, tuple[int, Layout]] = {
    "one": (1, {}),
    "one_distributed": (1, {DISTRIBUTED: True}),
    "tp2": (2, {TP: 2}),
    "tp2_sp": (2, {TP: 2, SP: True}),
    "pp2": (2, {PP: 2}),
    "pp2_vpp2": (2, {PP: 2, VPP: 2}),
    "cp2": (2, {CP: 2}),
    "dp2": (2, {}),
    "dp2_distributed": (2, {DISTRIBUTED: True}),
    "ep2": (2, {EP: 2}),
    "ep2_distributed": (2, {EP: 2, DISTRIBUTED: True}),
    "tp2_ep2_etp1": (2, {TP: 2, SP: True, EP: 2, ETP: 1}),
}
# every layout writes, and every layout reads what another wrote
CASES = {
    "dense": [
        ("one", "tp2"),
        ("tp2", "pp2"),
        ("pp2", "one_distributed"),
        ("pp2_vpp2", "dp2_distributed"),
        ("cp2", "pp2_vpp2"),
        ("dp2", "tp2_sp"),
        ("dp2_distributed", "one"),
        ("dp2_distributed", "tp2"),
        ("one_distributed", "dp2"),
    ],
    "moe": [
        ("ep2", "one"),
        ("one", "ep2_distributed"),
        ("ep2_distributed", "pp2"),
        ("tp2_ep2_etp1", "dp2_distributed"),
        ("dp2_distributed", "tp2_ep2_etp1"),
        ("pp2_vpp2", "ep2"),
    ],
}
# Pairs whose layouts differ from those of another pair only in the reader or the writer run with `long`.
SIMILAR = {
    *(("dense", *pair) for pair in (("tp2", "pp2"), ("dp2", "tp2_sp"), ("dp2_distributed", "tp2"))),
    *(("dense", "one_distributed", "dp2"), ("moe", "ep2", "one"), ("moe", "pp2_vpp2", "ep2")),
}
PAIRS = [
    pytest.param(kind, *pair, marks=[pytest.mark.long] if (kind, *pair) in SIMILAR else [])
    for kind, pairs in CASES.items()
    for pair in pairs
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = {"dense": "four_layers", "moe": "four_layers_moe"}
    return {kind: write_model(tmp_path_factory.mktemp(kind), family) for kind, family in families.items()}


class States:
    """Saved states per layout, created on first use."""

    def __init__(self, folder: Path, models: dict[str, Path], ranks: Ranks) -> None:
        self._folder, self._models, self._ranks = folder, models, ranks
        self._made: dict[str, dict[str, Any]] = {}

    def of(self, kind: str, name: str) -> tuple[Path, dict[str, Any]]:
        """The folder, and what the undisturbed run computed next; a run resumed there did it bit for bit."""
        key = f"{kind}-{name}"
        if key not in self._made:
            world_size, layout = LAYOUTS[name]
            self._made[key] = self._ranks.run(world_size, saved, self._models[kind], layout, self._folder / key)[0]
        return self._folder / key, self._made[key]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], ranks: Ranks) -> States:
    return States(tmp_path_factory.mktemp("states"), models, ranks)


def check_goes_on(got: dict[str, Any], want: dict[str, Any], rel: float = 1e-5) -> None:
    for mine, other in zip(got["updates"], want["updates"], strict=True):
        assert mine == pytest.approx(other, rel=rel, abs=1e-6)
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=rel)


@pytest.mark.parametrize(("kind", "writer", "reader"), PAIRS)
def test_state_goes_on_in_another_layout(
    models: dict[str, Path], states: States, ranks: Ranks, kind: str, writer: str, reader: str
) -> None:
    state, want = states.of(kind, writer)
    world_size, layout = LAYOUTS[reader]
    for got in ranks.run(world_size, resumed, models[kind], layout, state):
        check_goes_on(got, want)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("tp2", "dp2_distributed"),
        pytest.param("dp2_distributed", "one", marks=pytest.mark.long),
        pytest.param("pp2", "one_distributed", marks=pytest.mark.long),
    ],
)
def test_bfloat16_state_keeps_its_masters_in_another_layout(
    models: dict[str, Path], tmp_path: Path, ranks: Ranks, writer: str, reader: str
) -> None:
    world_size, layout = LAYOUTS[writer]
    want = ranks.run(world_size, saved, models["dense"], layout, tmp_path / "state", torch.bfloat16)[0]
    world_size, layout = LAYOUTS[reader]
    for got in ranks.run(world_size, resumed, models["dense"], layout, tmp_path / "state", torch.bfloat16):
        check_goes_on(got, want, rel=0.05)


@pytest.mark.parametrize(
    ("writer", "reader", "dtype"),
    [
        ("tp2_sp", "dp2_distributed", torch.float32),
        pytest.param("pp2", "one", torch.float32, marks=pytest.mark.long),
        pytest.param("dp2_distributed", "pp2", torch.float32, marks=pytest.mark.long),
        ("dp2_distributed", "tp2", torch.bfloat16),
    ],
)
def test_critic_goes_on_in_another_layout(
    models: dict[str, Path], tmp_path: Path, ranks: Ranks, writer: str, reader: str, dtype: torch.dtype
) -> None:
    """The critic keeps its value head in float32 beside bfloat16 weights."""
    world_size, layout = LAYOUTS[writer]
    state = tmp_path / "state"
    want = ranks.run(world_size, saved, models["dense"], layout, state, dtype, True)[0]
    world_size, layout = LAYOUTS[reader]
    for got in ranks.run(world_size, resumed, models["dense"], layout, state, dtype, True):
        check_goes_on(got, want, rel=1e-5 if dtype == torch.float32 else 0.05)


def test_no_bit_changes_on_the_way_through_other_layouts(
    models: dict[str, Path], states: States, tmp_path: Path, ranks: Ranks
) -> None:
    """Read and written again by one layout after the other, each tensor is the one that was written first."""
    first = state = states.of("moe", "ep2")[0]
    for number, name in enumerate(("dp2_distributed", "tp2_sp", "pp2_vpp2", "ep2_distributed", "one")):
        world_size, layout = LAYOUTS[name]
        ranks.run(world_size, converted, models["moe"], layout, state, tmp_path / str(number))
        state = tmp_path / str(number)
    (want,), (got,) = ranks.run(1, whole_tensors, first), ranks.run(1, whole_tensors, state)
    assert got.keys() == want.keys() and len(want) > 100
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert all(bool(tensor.any()) for tensor in want.values())


@pytest.mark.parametrize(
    "name", ["dp2_distributed", "ep2", *(pytest.param(n, marks=pytest.mark.long) for n in ("tp2", "pp2"))]
)
def test_asynchronous_save_holds_the_state_of_its_moment(
    models: dict[str, Path], states: States, tmp_path: Path, ranks: Ranks, name: str
) -> None:
    """Training goes on at once; what is written is what a save that waits writes."""
    world_size, layout = LAYOUTS[name]
    kind = "moe" if name == "ep2" else "dense"
    state = tmp_path / "state"
    got = ranks.run(world_size, saved, models[kind], layout, state, torch.float32, False, True)[0]
    same, want = states.of(kind, name)
    assert got["updates"] == want["updates"]
    (mine,), (other,) = ranks.run(1, whole_tensors, state), ranks.run(1, whole_tensors, same)
    assert all(torch.equal(mine[key], tensor) for key, tensor in other.items())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_save_that_fails_on_one_rank_fails_on_all_and_can_be_repeated(
    models: dict[str, Path], tmp_path: Path, ranks: Ranks, asynchronous: bool
) -> None:
    answers = ranks.run(2, failing_save, models["dense"], {TP: 2}, tmp_path, asynchronous)
    for first, second, numbers in answers:
        assert first.startswith(f"{tmp_path / 'first'}: cannot be written (rank 1: [Errno 27] File too large")
        assert second == "saved"
        assert bool(numbers) == asynchronous
    assert not (tmp_path / "first/manifest.json").exists()


def test_refusal_is_the_same_on_every_rank(
    models: dict[str, Path], states: States, tmp_path: Path, ranks: Ranks
) -> None:
    """One rank finds what is wrong: the last pipeline stage, or the one that checks the damaged file."""
    state = states.of("dense", "pp2")[0]
    other = write_model(tmp_path / "other", "qwen3_tied")
    for message in ranks.run(2, refused, other, {PP: 2}, state):
        assert "parameters of another model" in message
    (damaged := state / "__1_0.distcp").write_bytes(damaged.read_bytes()[:-10])
    messages = ranks.run(2, refused, models["dense"], {PP: 2}, state)
    assert len(set(messages)) == 1 and "__1_0.distcp: has" in messages[0] and "cut short" in messages[0]


def test_save_of_a_small_model_takes_a_fraction_of_a_second(
    models: dict[str, Path], tmp_path: Path, ranks: Ranks
) -> None:
    for times in ranks.run(2, timed_save, models["moe"], {EP: 2}, tmp_path):
        assert min(times) < 0.5, times
