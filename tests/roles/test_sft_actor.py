"""The supervised actor on real engines: masks with gaps, cuts of a mini-batch, skipped steps, and agreement."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from engine_cases import demonstrations, model_setup, optimizer_setup
from tiny_models import write_model

from roll_gspo.batch import Sequences
from roll_gspo.errors import TrainingError
from roll_gspo.roles.sft_actor import SftActor
from roll_gspo.strategies.base import TrainStrategy
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.train import HfTrain
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.micro_batches import MicroBatching


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sft"), "qwen3_tied")


def hf(checkpoint: Path, **changes: object) -> TrainStrategy:
    return HfTrain(model_setup(checkpoint), optimizer_setup(**changes), HfConfig())


def actor_of(strategy: TrainStrategy, micro_batching: MicroBatching | None = None) -> SftActor:
    return SftActor(
        strategy,
        mini_batch_size=6,
        micro_batching=micro_batching or MicroBatching(2),
        max_consecutive_skipped_steps=2,
    )


def nothing(done: int, total: int) -> None: ...


def test_loss_is_that_of_transformers_with_its_labels(checkpoint: Path) -> None:
    """Gaps are labels that are left out; transformers' own loss of the whole sequence says the same."""
    from transformers import AutoModelForCausalLM

    batch = demonstrations()
    sequences, model = batch.sequences, AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    labels = torch.full_like(sequences.input_ids, -100)
    predicted = sequences.predicting_mask.roll(1, dims=1)
    labels[predicted] = sequences.input_ids[predicted]
    with torch.no_grad():
        logits = model(input_ids=sequences.input_ids).logits / 0.7  # the temperature of `model_setup`
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    actor = actor_of(hf(checkpoint))
    total, num_tokens = actor.negative_log_likelihood(sequences)
    assert num_tokens == int((labels[:, 1:] != -100).sum()) == int(sequences.response_mask.sum())
    assert total / num_tokens == pytest.approx(float(expected), rel=1e-5)
    metrics = actor.update(batch, 1, nothing)
    assert metrics["sft/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert (metrics["sft/num_tokens"], metrics["actor/num_updates"]) == (num_tokens, 1)


@pytest.mark.parametrize("cut", [MicroBatching(1), MicroBatching(6), MicroBatching(2, max_tokens=40)])
def test_step_does_not_depend_on_micro_batches(checkpoint: Path, cut: MicroBatching) -> None:
    whole, parts = actor_of(hf(checkpoint), MicroBatching(4)), actor_of(hf(checkpoint), cut)
    expected, found = (actor.update(demonstrations(), 1, nothing) for actor in (whole, parts))
    assert found == pytest.approx(expected, rel=1e-5)
    weights = dict(whole._strategy.weights())
    for name, tensor in parts._strategy.weights():
        torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-5, msg=name)


def test_masked_and_padding_tokens_play_no_part(checkpoint: Path) -> None:
    batch = demonstrations()
    s = batch.sequences
    after = torch.arange(s.input_ids.shape[1]) >= s.lengths[:, None]
    other = Sequences(s.input_ids.masked_fill(after, 5), s.prompt_lengths, s.response_mask)
    actor = actor_of(hf(checkpoint))
    assert actor.negative_log_likelihood(other) == actor.negative_log_likelihood(s)


def test_steps_that_are_not_finite_are_skipped_named_and_stop_the_run(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = hf(checkpoint)
    with torch.no_grad():
        next(iter(engine._model.parameters())).fill_(torch.nan)  # type: ignore[attr-defined]
    actor = actor_of(engine)
    with caplog.at_level(logging.WARNING):
        assert actor.update(demonstrations(), 1, nothing)["actor/skipped_updates"] == 1
    assert "of the training data (rows counted from 0)" in caplog.text
    with pytest.raises(TrainingError, match="2 optimizer steps in a row were not finite"):
        actor.update(demonstrations(), 2, nothing)


@pytest.mark.megatron
@pytest.mark.parametrize("packed", [False, True])
def test_megatron_and_transformers_take_the_same_step(checkpoint: Path, packed: bool) -> None:
    from roll_gspo.strategies.megatron.engine.train import MegatronTrain

    config = MegatronConfig(use_sequence_packing=packed)
    ours = actor_of(MegatronTrain(model_setup(checkpoint), optimizer_setup(), config))
    oracle = actor_of(hf(checkpoint))
    sequences = demonstrations().sequences
    assert ours.negative_log_likelihood(sequences) == pytest.approx(oracle.negative_log_likelihood(sequences), rel=1e-5)
    found, expected = (actor.update(demonstrations(), 1, nothing) for actor in (ours, oracle))
    assert found == pytest.approx(expected, rel=1e-5)
    theirs = dict(oracle._strategy.weights())
    for name, tensor in ours._strategy.weights():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5, msg=name)
