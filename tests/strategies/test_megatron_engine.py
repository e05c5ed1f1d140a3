"""megatron-core against plain transformers: the same numbers forward, backward and after optimizer steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from engine_cases import (
    Checkpoints,
    model_setup,
    optimizer_setup,
    policy_loss,
    sequences,
    train_batch,
    weights_of,
)
from tiny_models import FAMILIES
from torch import Tensor

from roll_gspo.batch import TrainBatch
from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.metrics import Metric, to_floats
from roll_gspo.strategies.base import TokenScores, TrainStrategy
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig

megatron = pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)
pytestmark = pytest.mark.megatron


def _trainer(folder: Path, dtype: torch.dtype = torch.float32, config: MegatronConfig | None = None) -> TrainStrategy:
    return megatron.MegatronTrain(model_setup(folder, dtype), optimizer_setup(), config or MegatronConfig())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers(checkpoint: Checkpoints, family: str) -> None:
    setup = model_setup(checkpoint(family))
    want = HfInfer(setup, HfConfig()).score(sequences(), entropy=True)
    got = megatron.MegatronInfer(setup, MegatronConfig()).score(sequences(), entropy=True)
    tolerance = 1e-3 if "moe" in family else 1e-4
    torch.testing.assert_close(got.log_probs, want.log_probs, rtol=0, atol=tolerance)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=0, atol=tolerance)
    mask = sequences().response_mask
    assert bool((got.log_probs[mask] < 0).all()) and torch.count_nonzero(got.log_probs[~mask]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_equal_transformers(checkpoint: Checkpoints, family: str) -> None:
    want, got = HfTrain(model_setup(checkpoint(family)), optimizer_setup(), HfConfig()), _trainer(checkpoint(family))
    start = weights_of(want)
    for step in range(3):
        results = [engine.update(train_batch(step).split(2), policy_loss, True) for engine in (want, got)]
        assert all(result.applied for result in results)
        for figure in ("loss", "grad_norm", "learning_rate"):
            values = [vars(result)[figure] for result in results]
            assert values[1] == pytest.approx(values[0], rel=1e-5, abs=1e-6), (step, figure)
        assert to_floats(results[1].metrics) == pytest.approx(to_floats(results[0].metrics), rel=1e-5)
    expected, trained = weights_of(want), weights_of(got)
    assert trained.keys() == expected.keys()
    for name, weight in expected.items():
        # Adam blows rounding up where a gradient is about 0, so single elements may differ by up to 1e-4
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-4 if "moe" in family else 2e-5)
        moved = (weight - start[name]).norm()
        assert moved > 1e-3 and (trained[name] - weight).norm() < 1e-4 * moved, name


def test_update_does_not_depend_on_micro_batches(checkpoint: Checkpoints) -> None:
    start = weights_of(_trainer(checkpoint("qwen3_tied")))
    results, weights = [], []
    for size in (6, 1, 4):
        engine = _trainer(checkpoint("qwen3_tied"))
        results.append([engine.update(train_batch(step).split(size), policy_loss, True) for step in range(2)])
        weights.append(weights_of(engine))
    for other, other_weights in zip(results[1:], weights[1:], strict=True):
        for a, b in zip(results[0], other, strict=True):
            assert (b.loss, b.grad_norm) == pytest.approx((a.loss, a.grad_norm), rel=2e-6, abs=1e-6)
        for name, weight in weights[0].items():
            assert (other_weights[name] - weight).norm() < 1e-4 * (weight - start[name]).norm(), name


@pytest.mark.parametrize("engine_name", ["megatron", "hf"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_update_is_skipped(checkpoint: Checkpoints, engine_name: str, what: str) -> None:
    folder = checkpoint("qwen3_tied")

    def make() -> TrainStrategy:
        if engine_name == "megatron":
            return _trainer(folder)
        return HfTrain(model_setup(folder), optimizer_setup(), HfConfig())

    engine, fresh = make(), make()

    def poisoned(scores: TokenScores, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
        loss, metrics = policy_loss(scores, batch)
        if 4 not in batch.sample_ids:
            return loss, metrics
        # sqrt(0) is 0 with an infinite slope: a finite loss without a finite gradient
        zero = (loss - loss.detach()).clamp(min=0)
        return (loss * math.inf if what == "loss" else loss + zero.sqrt()), metrics

    before = weights_of(engine)
    skipped = engine.update(train_batch().split(2), poisoned, True)
    assert not skipped.applied and math.isfinite(skipped.loss) == (what == "gradient")
    assert all(torch.equal(before[name], weight) for name, weight in engine.weights())
    # neither optimizer nor schedule took notice of it
    after, alone = (e.update(train_batch().split(2), policy_loss, True) for e in (engine, fresh))
    assert after.applied and after.learning_rate == alone.learning_rate and after.grad_norm == alone.grad_norm
    expected = weights_of(fresh)
    assert all(torch.equal(expected[name], weight) for name, weight in engine.weights())


@pytest.mark.parametrize("engine_name", ["hf", "megatron", "megatron_bf16", "megatron_distributed_optimizer"])
def test_resumed_training_is_bit_identical(checkpoint: Checkpoints, tmp_path: Path, engine_name: str) -> None:
    folder = checkpoint("qwen3_moe")

    def make() -> TrainStrategy:
        if engine_name == "hf":
            return HfTrain(model_setup(folder), optimizer_setup(), HfConfig())
        dtype = torch.bfloat16 if engine_name == "megatron_bf16" else torch.float32
        config = MegatronConfig(use_distributed_optimizer=engine_name == "megatron_distributed_optimizer")
        return _trainer(folder, dtype, config)

    def steps(engine: TrainStrategy, numbers: range) -> list[tuple[float, float, float]]:
        results = [engine.update(train_batch(n).split(4), policy_loss, True) for n in numbers]
        assert all(result.applied for result in results)
        return [(r.loss, r.grad_norm, r.learning_rate) for r in results]

    whole, first, second = make(), make(), make()
    steps(whole, range(2))
    steps(first, range(2))
    first.save(tmp_path)
    draw_after_save = torch.rand(3)
    steps(second, range(7, 8))  # a state to be overwritten
    second.load(tmp_path)
    assert torch.equal(torch.rand(3), draw_after_save)
    assert steps(second, range(2, 5)) == steps(whole, range(2, 5))
    expected = weights_of(whole)
    assert all(torch.equal(expected[name], weight) for name, weight in second.weights())


@pytest.mark.parametrize(
    "config",
    [
        MegatronConfig(use_distributed_optimizer=True),
        MegatronConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        MegatronConfig(recompute_granularity="selective"),
        MegatronConfig(overlap_grad_reduce=True),
        MegatronConfig(moe_token_dispatcher_type="allgather"),
    ],
    ids=["distributed_optimizer", "recompute_full", "recompute_selective", "overlap", "allgather"],
)
def test_memory_options_change_no_number(checkpoint: Checkpoints, config: MegatronConfig) -> None:
    plain, other = _trainer(checkpoint("qwen3_moe")), _trainer(checkpoint("qwen3_moe"), config=config)
    for step in range(2):
        a, b = (engine.update(train_batch(step).split(3), policy_loss, True) for engine in (plain, other))
        assert (b.loss, b.grad_norm) == pytest.approx((a.loss, a.grad_norm), rel=1e-5)
    for (name, weight), (_, same) in zip(plain.weights(), other.weights(), strict=True):
        torch.testing.assert_close(same, weight, rtol=0, atol=1e-4, msg=name)
        assert (same - weight).norm() < 1e-5 * weight.norm(), name


@pytest.mark.parametrize("engine_name", ["megatron", "hf"])
def test_bfloat16_keeps_updates_that_are_too_small_for_it(checkpoint: Checkpoints, engine_name: str) -> None:
    folder, optimizer = checkpoint("qwen3_untied"), optimizer_setup(learning_rate=1e-5, warmup_steps=0, total_steps=99)

    def make(dtype: torch.dtype) -> TrainStrategy:
        if engine_name == "megatron":
            return megatron.MegatronTrain(model_setup(folder, dtype), optimizer, MegatronConfig())
        return HfTrain(model_setup(folder, dtype), optimizer, HfConfig())

    exact, engine = make(torch.float32), make(torch.bfloat16)
    start = weights_of(engine)
    for step in range(20):
        a, b = (e.update(train_batch(step % 2).split(3), policy_loss, True) for e in (exact, engine))
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=0.1) and b.loss == pytest.approx(a.loss, abs=0.1)
    # one step is 1e-5, half a unit in the last place of most weights here above 1e-4: only the sum of steps shows
    moved = [(weight != start[name]).float().mean() for name, weight in weights_of(engine).items()]
    assert {weight.dtype for _, weight in engine.weights()} == {torch.bfloat16}
    assert 0.05 < float(torch.stack(moved).mean()) < 0.9


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_moe"])
def test_gradient_norm_is_megatrons_bit_for_bit(checkpoint: Checkpoints, family: str) -> None:
    from roll_gspo.strategies.megatron.engine.gradients import gradient_norm

    optimizer = _trainer(checkpoint(family))._trainer._optimizer  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    for part in optimizer.chained_optimizers:
        for parameter in part.get_parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.prepare_grads()
    assert gradient_norm(optimizer) == optimizer.get_grad_norm() > 10


def test_reference_beside_the_trainer_does_not_move(checkpoint: Checkpoints) -> None:
    engine = _trainer(checkpoint("qwen3_tied"))
    reference = megatron.MegatronInfer(model_setup(checkpoint("qwen3_tied")), MegatronConfig())
    before = reference.score(sequences()).log_probs
    assert torch.equal(engine.score(sequences()).log_probs, before)
    engine.update(train_batch().split(3), policy_loss, True)
    assert torch.equal(reference.score(sequences()).log_probs, before)
    assert not torch.allclose(engine.score(sequences()).log_probs, before, atol=1e-3)


def test_load_refuses_the_state_of_another_model(checkpoint: Checkpoints, tmp_path: Path) -> None:
    engine = _trainer(checkpoint("qwen3_tied"))
    with pytest.raises(CheckpointError, match="no such file"):
        engine.load(tmp_path)
    _trainer(checkpoint("llama")).save(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        engine.load(tmp_path)


def test_layouts_that_do_not_fit_are_refused_by_name(checkpoint: Checkpoints) -> None:
    with pytest.raises(ConfigError, match=r"strategy_config\.tensor_model_parallel_size: 2 .*1 rank"):
        _trainer(checkpoint("qwen3_tied"), config=MegatronConfig(tensor_model_parallel_size=2))
    with pytest.raises(ConfigError, match=r"strategy_config\.moe_grouped_gemm: .*CUDA"):
        _trainer(checkpoint("qwen3_tied"), config=MegatronConfig(moe_grouped_gemm=True))
