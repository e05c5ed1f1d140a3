"""Engines that leave the device and return: values bit for bit, and training that continues as without a move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    Checkpoints,
    model_setup,
    optimizer_setup,
    policy_loss,
    sequences,
    train_batch,
    value_batch,
    value_weights,
    weights_of,
)
from torch import Tensor

from roll_gspo.batch import TrainBatch
from roll_gspo.errors import ResidencyError
from roll_gspo.metrics import Metric
from roll_gspo.strategies import offload
from roll_gspo.strategies.base import Sampling
from roll_gspo.strategies.fsdp2.config import Fsdp2Config
from roll_gspo.strategies.fsdp2.engine.infer import Fsdp2Infer
from roll_gspo.strategies.fsdp2.engine.train import Fsdp2Train
from roll_gspo.strategies.fsdp2.engine.value import Fsdp2Value
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.hf.value import HfValue
from roll_gspo.strategies.offload import EngineState, Part, outside
from roll_gspo.strategies.residency import OffloadableEngine, Residency

OFFLOADED, WEIGHTS, FULL = Residency
MEGATRON = pytest.param("megatron", marks=pytest.mark.megatron)
TRAINERS = [
    *("hf", "fsdp2", "fsdp2_bf16"),
    *(
        pytest.param(name, marks=pytest.mark.megatron)
        for name in ("megatron", "megatron_bf16", "megatron_dist", "megatron_dist_bf16", "megatron_moe_dist")
    ),
]


def trainer_of(name: str, checkpoint: Checkpoints) -> Any:
    """Build a trainer: its optimizer keeps its state in another form for each name."""
    folder = checkpoint("qwen3_moe" if "moe" in name else "qwen3_tied")
    setup = model_setup(folder, torch.bfloat16 if "bf16" in name else torch.float32)
    if name == "hf":
        return HfTrain(setup, optimizer_setup(), HfConfig())
    if name.startswith("fsdp2"):
        return Fsdp2Train(setup, optimizer_setup(), Fsdp2Config())
    megatron = pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)
    from roll_gspo.strategies.megatron.config import MegatronConfig

    config = MegatronConfig(use_distributed_optimizer="dist" in name)
    return megatron.MegatronTrain(setup, optimizer_setup(), config)


def update(engine: Any, number: int) -> tuple[float, float]:
    result = engine.update(train_batch(number).split(2), policy_loss, True)
    assert result.applied
    return result.loss, result.grad_norm


def memory_of(engine: Any) -> dict[Residency, int]:
    """Bytes behind the tensors of an engine, by the residency that needs them."""
    sizes: dict[Residency, int] = dict.fromkeys(Residency, 0)
    for needed, part in engine._state._parts:
        sizes[needed] += sum(storage.nbytes() for storage in offload._distinct(part._tensors()))
    return sizes


@pytest.mark.parametrize("name", TRAINERS)
def test_training_continues_as_without_a_move(checkpoint: Checkpoints, name: str) -> None:
    stays, moves = trainer_of(name, checkpoint), trainer_of(name, checkpoint)
    assert isinstance(moves, OffloadableEngine) and moves.residency == FULL
    everything = None
    for number in range(3):
        for residency in (OFFLOADED, WEIGHTS):
            moves.reside(residency)
            assert moves.residency == residency
        assert torch.equal(moves.score(sequences()).log_probs, stays.score(sequences()).log_probs)
        moves.reside(OFFLOADED)
        moves.reside(FULL)
        assert update(moves, number) == update(stays, number)
        for (key, one), (_, other) in zip(weights_of(stays).items(), weights_of(moves).items(), strict=True):
            assert torch.equal(one, other), key
        everything = memory_of(moves)
        assert everything[WEIGHTS] > 0 and everything[FULL] > 1.9 * everything[WEIGHTS], "two moments of each parameter"
        moves.reside(WEIGHTS)
        assert memory_of(moves) == {**everything, FULL: 0}
        moves.reside(OFFLOADED)
        assert sum(memory_of(moves).values()) == 0
    moves.reside(FULL)
    assert memory_of(moves) == everything


@pytest.mark.parametrize("name", TRAINERS[:6])
def test_a_checkpoint_does_not_depend_on_residency(checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    stays, moves = trainer_of(name, checkpoint), trainer_of(name, checkpoint)
    for engine in (stays, moves):
        update(engine, 0)
    (tmp_path / "state").mkdir()
    moves.reside(OFFLOADED)
    with pytest.raises(ResidencyError, match="cannot save while its state is offloaded"):
        moves.save(tmp_path / "state")
    moves.reside(FULL)
    moves.save(tmp_path / "state")
    fresh = trainer_of(name, checkpoint)
    fresh.reside(OFFLOADED)
    with pytest.raises(ResidencyError, match="cannot load"):
        fresh.load(tmp_path / "state")
    fresh.reside(FULL)
    fresh.load(tmp_path / "state")
    fresh.reside(OFFLOADED)
    fresh.reside(FULL)
    assert update(fresh, 1) == update(stays, 1)


@pytest.mark.parametrize("name", ["hf", "fsdp2", MEGATRON])
def test_a_critic_moves_too(checkpoint: Checkpoints, name: str) -> None:
    def build() -> Any:
        setup = model_setup(checkpoint("qwen3_tied"))
        if name == "hf":
            return HfValue(setup, optimizer_setup(), HfConfig())
        if name == "fsdp2":
            return Fsdp2Value(setup, optimizer_setup(), Fsdp2Config())
        from roll_gspo.strategies.megatron.config import MegatronConfig
        from roll_gspo.strategies.megatron.engine import MegatronValue

        return MegatronValue(setup, optimizer_setup(), MegatronConfig())

    def squared(values: Tensor, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
        return torch.where(batch.response_mask, (values - batch.returns) ** 2, 0.0).mean(), {}  # type: ignore[operator]

    stays, moves = build(), build()
    for number in range(2):
        moves.reside(OFFLOADED)
        with pytest.raises(ResidencyError, match="cannot compute values"):
            moves.values(sequences())
        moves.reside(WEIGHTS)
        assert torch.equal(moves.values(sequences()), stays.values(sequences()))
        with pytest.raises(ResidencyError, match=r"cannot update .* is at WEIGHTS, update needs FULL"):
            moves.update(value_batch(number).split(2), squared)
        moves.reside(FULL)
        results = [engine.update(value_batch(number).split(2), squared).loss for engine in (stays, moves)]
        assert results[0] == results[1]
    for key, weight in value_weights(stays).items():
        assert torch.equal(weight, value_weights(moves)[key]), key


@pytest.mark.parametrize("name", ["hf", "fsdp2", MEGATRON])
def test_a_reference_returns_from_one_copy_on_the_host(checkpoint: Checkpoints, name: str) -> None:
    if name == "hf":
        engine: Any = HfInfer(model_setup(checkpoint("qwen2")), HfConfig())
    elif name == "fsdp2":
        engine = Fsdp2Infer(model_setup(checkpoint("qwen2")), Fsdp2Config())
    else:
        from roll_gspo.strategies.megatron.config import MegatronConfig
        from roll_gspo.strategies.megatron.engine import MegatronInfer

        engine = MegatronInfer(model_setup(checkpoint("qwen2")), MegatronConfig())
    want = engine.score(sequences()).log_probs
    copies = []
    for _ in range(2):
        engine.reside(OFFLOADED)
        with pytest.raises(ResidencyError, match=f"{name}_infer: cannot score while its state is offloaded"):
            engine.score(sequences())
        copies.append([chunk.data_ptr() for chunk in engine._state._parts[0][1]._chunks])
        engine.reside(WEIGHTS)
        assert torch.equal(engine.score(sequences()).log_probs, want)
    assert copies[0] == copies[1] != []


def test_an_hf_engine_generates_as_before_and_only_with_all_of_its_state(checkpoint: Checkpoints) -> None:
    engine = HfInfer(model_setup(checkpoint("qwen2")), HfConfig())
    trainer = HfTrain(model_setup(checkpoint("qwen2")), optimizer_setup(), HfConfig())

    def sampled() -> list[Any]:
        return engine.generate([[3, 4, 5], [6]], Sampling(2, 8), [1, 2])

    first = sampled()
    for residency in (OFFLOADED, WEIGHTS):
        engine.reside(residency)
        with pytest.raises(ResidencyError, match="hf_infer: cannot generate"):
            sampled()
    engine.reside(FULL)
    assert sampled() == first
    update(trainer, 0)
    update(trainer, 1)
    engine.reside(OFFLOADED)
    with pytest.raises(ResidencyError, match="cannot receive weights"):
        engine.update_weights(trainer.weights(), 1)
    engine.reside(WEIGHTS)
    engine.update_weights(trainer.weights(), 1)
    engine.reside(FULL)
    changed = sampled()
    engine.reside(OFFLOADED)
    engine.reside(FULL)
    assert sampled() == changed, "the new weights return, not those that left before"
    log_probs = [[c.log_probs for c in group] for group in changed]
    assert log_probs != [[c.log_probs for c in group] for group in first]


def test_views_of_moved_memory_stay_valid() -> None:
    owner = torch.arange(12.0).view(3, 4)
    row, shared = owner[1], torch.nn.Parameter(owner)
    part = Part(lambda: [owner, shared, row])
    part.leave()
    assert owner.untyped_storage().nbytes() == 0
    part.come_back()
    assert torch.equal(shared, torch.arange(12.0).view(3, 4)) and torch.equal(row, torch.arange(4.0, 8.0))
    row.zero_()
    assert float(owner[1].abs().sum()) == 0


def test_large_parts_are_copied_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "CHUNK_BYTES", 64)
    tensors = [torch.arange(float(length)) for length in (5, 40, 0, 16, 1)]
    part = Part(lambda: tensors)
    for _ in range(2):
        part.leave()
        assert [len(chunk) for chunk in part._chunks] == [64, 64, 64, 56]
        part.come_back()
        assert all(torch.equal(t, torch.arange(float(len(t)))) for t in tensors)


def test_gradients_return_as_zeros_and_need_no_host_memory() -> None:
    gradients = torch.ones(8)
    part = Part(lambda: [gradients], "zeros")
    part.leave()
    part.come_back()
    assert float(gradients.sum()) == 0 and not part._chunks


def test_scalars_and_memory_of_the_weights_are_no_optimizer_state() -> None:
    weight, moment, step = torch.ones(3), torch.ones(3), torch.ones(())
    assert outside([weight[1:], moment, step], [weight]) == [moment]


class _Failing(Part):
    """A part for which one of its moves fails once."""

    def __init__(self, tensor: Tensor, fails: str) -> None:
        super().__init__(lambda: [tensor])
        self._fails = fails

    def _fail(self, move: str) -> None:
        if self._fails == move:
            self._fails = ""
            raise torch.OutOfMemoryError(f"no memory to {move}")

    def _reserve(self, size: int, pinned: bool) -> None:
        self._fail("leave")
        super()._reserve(size, pinned)

    def come_back(self) -> None:
        self._fail("come back")
        super().come_back()


@pytest.mark.parametrize(
    ("part", "move", "start", "target", "left_at"),
    [
        ("weights", "leave", FULL, OFFLOADED, WEIGHTS),
        ("moments", "leave", FULL, OFFLOADED, FULL),
        ("weights", "come back", OFFLOADED, FULL, OFFLOADED),
        ("moments", "come back", OFFLOADED, FULL, WEIGHTS),
    ],
)
def test_a_failed_move_leaves_a_state_from_which_it_can_be_repeated(
    part: str, move: str, start: Residency, target: Residency, left_at: Residency
) -> None:
    tensors = {"weights": torch.arange(4.0), "moments": torch.arange(6.0)}
    parts: dict[str, Part] = {name: Part(lambda name=name: [tensors[name]]) for name in tensors}
    parts[part] = _Failing(tensors[part], move)
    state = EngineState("some_engine", parts["weights"], [parts["moments"]])
    if start == OFFLOADED:
        state.reside(OFFLOADED)
    with pytest.raises(ResidencyError, match=rf"some_engine: .* to {target.name} \(no memory to {move}\)"):
        state.reside(target)
    assert state.residency == left_at
    state.reside(target)
    assert state.residency == target
    state.reside(FULL)
    assert all(torch.equal(tensor, torch.arange(float(len(tensor)))) for tensor in tensors.values())


@pytest.fixture(name="made")
def _made() -> Callable[[Residency], EngineState]:
    return lambda residency: EngineState("some_engine", Part(lambda: [torch.ones(1)]))


def test_an_engine_that_only_infers_says_what_it_was_asked_for(made: Callable[[Residency], EngineState]) -> None:
    state = made(FULL)
    for residency in Residency:
        state.reside(residency)
        assert state.residency == residency
    state.reside(WEIGHTS)
    state.need(WEIGHTS, "score")
    with pytest.raises(ResidencyError, match="some_engine: cannot generate"):
        state.need(FULL, "generate")


def test_memory_of_a_checkpoint_file_can_leave(checkpoint: Checkpoints) -> None:
    engine = HfTrain(model_setup(checkpoint("qwen2")), optimizer_setup(), HfConfig())
    before = weights_of(engine)
    engine.reside(OFFLOADED)
    assert memory_of(engine)[WEIGHTS] == 0
    engine.reside(FULL)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(engine).items())
