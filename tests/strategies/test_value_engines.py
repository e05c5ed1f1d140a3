"""The critic's engines: which states are valued, what learning changes, and that nothing leaks from padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import (
    VALUE_HEAD,
    Checkpoints,
    model_setup,
    optimizer_setup,
    sequences,
    value_batch,
    value_weights,
    with_random_head,
)
from tiny_models import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.value_loss import ValueLossSettings, explained_variance, value_loss
from roll_gspo.batch import TrainBatch
from roll_gspo.config.strategy import TrainStrategyArgs, args_class
from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.metrics import Metric
from roll_gspo.strategies.base import UpdateResult, ValueStrategy
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig

ENGINES = ["hf", pytest.param("megatron", marks=pytest.mark.megatron)]
Loss = Callable[[Tensor, TrainBatch], tuple[Tensor, dict[str, Metric]]]


def engine_of(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, config: MegatronConfig | None = None, **changes: object
) -> ValueStrategy:
    if name == "megatron":
        pytest.importorskip("roll_gspo.strategies.megatron.engine", exc_type=ImportError)
    options = {"strategy_config": config} if config is not None and name == "megatron" else {}
    args = args_class(f"{name}_train", TrainStrategyArgs)(strategy_name=f"{name}_train", **options)
    return args.build_value(model_setup(folder, dtype), optimizer_setup(**changes))


def loss_of(batch: TrainBatch, value_clip: float | None = None) -> Loss:
    denominators = Denominators.of(batch.response_mask)
    return lambda values, part: value_loss(values, part, denominators, ValueLossSettings(value_clip))


def step(engine: ValueStrategy, batch: TrainBatch, micro_batch_size: int = 2) -> UpdateResult:
    result = engine.update(batch.split(micro_batch_size), loss_of(batch, 0.5))
    assert result.applied
    return result


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_of_the_states_that_tokens_were_sampled_in(checkpoint: Checkpoints, name: str, family: str) -> None:
    engine = with_random_head(engine_of(name, checkpoint(family)))
    oracle = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    tokens = sequences()
    expected = torch.zeros(tokens.response_mask.shape)
    rows = zip(tokens.input_ids, tokens.prompt_lengths.tolist(), tokens.lengths.tolist(), strict=True)
    for row, (ids, prompt_length, length) in enumerate(rows):
        with torch.no_grad():  # alone, without padding
            hidden = oracle.model(input_ids=ids[None, :length]).last_hidden_state[0]
        states = hidden[prompt_length - 1 : length - 1]  # the last prompt token predicts the first response token
        expected[row, : length - prompt_length] = states @ value_weights(engine)[VALUE_HEAD][0]
    found = engine.values(tokens)
    assert found.dtype == torch.float32 and found.device.type == "cpu" and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float(found.std()) > 0.1 and torch.count_nonzero(found[~tokens.response_mask]) == 0


@pytest.mark.parametrize("name", ENGINES)
def test_values_start_at_zero_and_the_first_gradient_is_the_heads(checkpoint: Checkpoints, name: str) -> None:
    engine = engine_of(name, checkpoint("qwen3_tied"), weight_decay=0.0)
    assert torch.count_nonzero(engine.values(sequences())) == 0
    start = copied(value_weights(engine))
    assert start[VALUE_HEAD].shape == (1, 64), "a tied output layer leaves its tensor to the embedding"
    step(engine, value_batch())
    moved = [key for key, weight in value_weights(engine).items() if not torch.equal(weight, start[key])]
    assert moved == [VALUE_HEAD]
    step(engine, value_batch())
    assert all(not torch.equal(weight, start[key]) for key, weight in value_weights(engine).items())


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("family", ["qwen3_untied", "qwen3_moe"])
def test_values_learn_returns_from_a_head_of_zeros(checkpoint: Checkpoints, name: str, family: str) -> None:
    engine = engine_of(name, checkpoint(family), lr_scheduler_type="constant", learning_rate=3e-3, weight_decay=0.0)
    tokens = sequences()
    mask = tokens.response_mask
    # the sum of the next two tokens: nothing that a constant, or the head alone, could say
    following = tokens.response_ids.float() / 30
    returns = (following + following.roll(-1, 1)).masked_fill(~mask, torch.nan)
    batch = replace(value_batch(), returns=returns, values=None)
    losses = [engine.update(batch.split(3), loss_of(batch)).loss for _ in range(60)]
    assert losses[-1] < 0.05 * losses[0]
    assert explained_variance(engine.values(tokens), returns, mask) > 0.9


@pytest.mark.parametrize("name", ENGINES)
def test_update_of_values_does_not_depend_on_micro_batches(checkpoint: Checkpoints, name: str) -> None:
    results, weights = [], []
    for size in (6, 1, 4):
        engine = with_random_head(engine_of(name, checkpoint("qwen3_moe"), learning_rate=1e-3))
        results.append([step(engine, value_batch(number), size) for number in range(2)])
        weights.append(value_weights(engine))
    for other, other_weights in zip(results[1:], weights[1:], strict=True):
        for a, b in zip(results[0], other, strict=True):
            assert (b.loss, b.grad_norm) == pytest.approx((a.loss, a.grad_norm), rel=2e-6)
            assert {key: float(m.value) for key, m in b.metrics.items()} == pytest.approx(
                {key: float(m.value) for key, m in a.metrics.items()}, rel=1e-5
            )
        for key, weight in weights[0].items():
            torch.testing.assert_close(other_weights[key], weight, rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ENGINES)
def test_padding_and_masked_samples_reach_neither_values_nor_weights(checkpoint: Checkpoints, name: str) -> None:
    """Masked returns and values are NaN in these batches; tokens of the padding are changed here."""
    batch = value_batch()
    assert bool(batch.returns is not None and batch.returns[~batch.response_mask].isnan().all())
    mask = batch.response_mask.clone()
    mask[2] = False  # a sample that the loss does not see
    tokens = replace(batch.sequences, response_mask=mask)
    other = tokens.input_ids.masked_fill(~tokens.attention_mask, 7)
    batches = [replace(batch, sequences=replace(tokens, input_ids=ids)) for ids in (tokens.input_ids, other)]
    engines = [with_random_head(engine_of(name, checkpoint("qwen3_tied"))) for _ in batches]
    results = [step(engine, b, 1) for engine, b in zip(engines, batches, strict=True)]
    assert math.isfinite(results[0].loss) and results[0].grad_norm == results[1].grad_norm > 0
    for (key, weight), same in zip(value_weights(engines[0]).items(), value_weights(engines[1]).values(), strict=True):
        assert bool(weight.isfinite().all()) and torch.equal(weight, same), key
    a, b = (engine.values(each.sequences) for engine, each in zip(engines, batches, strict=True))
    assert torch.equal(a, b) and torch.count_nonzero(a[~mask]) == 0


@pytest.mark.parametrize("name", ENGINES)
def test_value_update_that_is_not_finite_is_skipped(checkpoint: Checkpoints, name: str) -> None:
    engine, fresh = (with_random_head(engine_of(name, checkpoint("qwen3_tied"))) for _ in range(2))
    batch, start = value_batch(), copied(value_weights(engine))
    assert batch.returns is not None
    bad = replace(batch, returns=torch.where(batch.sample_ids[:, None] == 4, math.inf, batch.returns))
    skipped = engine.update(bad.split(2), loss_of(bad))
    assert not skipped.applied and not math.isfinite(skipped.loss)
    assert all(torch.equal(start[key], weight) for key, weight in value_weights(engine).items())
    # neither optimizer nor schedule took notice of it
    after, alone = step(engine, batch), step(fresh, batch)
    assert (after.learning_rate, after.grad_norm) == (alone.learning_rate, alone.grad_norm)
    expected = value_weights(fresh)
    assert all(torch.equal(expected[key], weight) for key, weight in value_weights(engine).items())


@pytest.mark.parametrize(
    ("name", "dtype", "distributed"),
    [
        ("hf", torch.float32, False),
        ("hf", torch.bfloat16, False),
        pytest.param("megatron", torch.float32, False, marks=pytest.mark.megatron),
        pytest.param("megatron", torch.bfloat16, False, marks=pytest.mark.megatron),
        pytest.param("megatron", torch.bfloat16, True, marks=pytest.mark.megatron),
    ],
)
def test_resumed_value_training_is_bit_identical(
    checkpoint: Checkpoints, tmp_path: Path, name: str, dtype: torch.dtype, distributed: bool
) -> None:
    config = MegatronConfig(use_distributed_optimizer=distributed)
    whole, first, second = (engine_of(name, checkpoint("qwen3_moe"), dtype, config) for _ in range(3))

    def steps(engine: ValueStrategy, numbers: range) -> list[tuple[float, float, float]]:
        results = [step(engine, value_batch(number)) for number in numbers]
        return [(r.loss, r.grad_norm, r.learning_rate) for r in results]

    steps(whole, range(2))
    steps(first, range(2))
    first.save(tmp_path)
    steps(second, range(7, 8))  # a state to be overwritten
    second.load(tmp_path)
    assert torch.equal(first.values(sequences()), second.values(sequences()))
    assert steps(second, range(2, 5)) == steps(whole, range(2, 5))
    expected = value_weights(whole)
    assert all(torch.equal(expected[key], weight) for key, weight in value_weights(second).items())
    assert (
        expected[VALUE_HEAD].dtype == torch.float32
        and torch.count_nonzero(expected[VALUE_HEAD]) == expected[VALUE_HEAD].numel()
    )


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_untied"])
def test_state_of_a_policy_is_not_loaded_into_a_critic(
    checkpoint: Checkpoints, tmp_path: Path, name: str, family: str
) -> None:
    critic = engine_of(name, checkpoint(family))
    with pytest.raises(CheckpointError, match="no such file"):
        critic.load(tmp_path)
    setup, optimizer = model_setup(checkpoint(family)), optimizer_setup()
    if name == "hf":
        policy = HfTrain(setup, optimizer, HfConfig())
    else:
        from roll_gspo.strategies.megatron.engine import MegatronTrain

        policy = MegatronTrain(setup, optimizer, MegatronConfig())
    policy.save(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        critic.load(tmp_path)


@pytest.mark.parametrize("name", ENGINES)
def test_critic_beside_policy_and_reference_moves_alone(checkpoint: Checkpoints, name: str) -> None:
    folder = checkpoint("qwen3_moe")
    critic = engine_of(name, folder)
    if name == "hf":
        from roll_gspo.strategies.hf.infer import HfInfer

        others = [HfTrain(model_setup(folder), optimizer_setup(), HfConfig()), HfInfer(model_setup(folder), HfConfig())]
    else:
        from roll_gspo.strategies.megatron.engine import MegatronInfer, MegatronTrain

        policy = MegatronTrain(model_setup(folder), optimizer_setup(), MegatronConfig())
        others = [policy, MegatronInfer(model_setup(folder), MegatronConfig())]
    before = [other.score(sequences()).log_probs for other in others]
    for number in range(2):
        step(critic, value_batch(number))
    values = critic.values(sequences())
    assert torch.count_nonzero(values) > 0
    assert all(torch.equal(o.score(sequences()).log_probs, b) for o, b in zip(others, before, strict=True))


def test_value_engines_refuse_half_precision_weights(checkpoint: Checkpoints) -> None:
    with pytest.raises(ConfigError, match=r"dtype torch\.float16 is not supported; use float32 or bfloat16"):
        engine_of("hf", checkpoint("llama"), torch.float16)
