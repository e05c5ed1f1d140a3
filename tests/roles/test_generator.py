from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_cases import model_setup, optimizer_setup
from tiny_models import write_model

from roll_gspo.batch import Prompt
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.reference import Reference
from roll_gspo.strategies.base import Sampling
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.train import HfTrain

PROMPTS = [Prompt((5, 6, 7), "a", {}), Prompt((9,), "b", {})]
SAMPLING = Sampling(num_samples=3, max_new_tokens=6, temperature=0.7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("generator"), "qwen3_tied")


def generator(checkpoint: Path, seed: int = 0) -> Generator:
    return Generator(HfInfer(model_setup(checkpoint), HfConfig()), pad_token_id=0, seed=seed)


def test_samples_are_decided_by_seed_and_purpose(checkpoint: Path) -> None:
    def tokens(generator: Generator, purpose: str) -> list[tuple[int, ...]]:
        return [c.token_ids for c in generator.generate(PROMPTS, SAMPLING, purpose).completions]

    step_1 = tokens(generator(checkpoint), "step 1")
    assert step_1 == tokens(generator(checkpoint), "step 1"), "a resumed run samples the same"
    assert step_1 != tokens(generator(checkpoint), "step 2")
    assert step_1 != tokens(generator(checkpoint, seed=1), "step 1")
    assert len(set(step_1)) == 6, "every sample has a different seed"


def test_rollouts_carry_groups_log_probs_and_version(checkpoint: Path) -> None:
    role = generator(checkpoint)
    trainer = HfTrain(model_setup(checkpoint), optimizer_setup(), HfConfig())
    role.update_weights(trainer.weights(), version=3)
    rollouts = role.generate(PROMPTS, SAMPLING, "step 4")
    assert rollouts.weights_version == 3 and rollouts.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    scored = trainer.score(rollouts.sequences).log_probs
    torch.testing.assert_close(rollouts.rollout_log_probs, scored, atol=1e-4, rtol=0)
    role.close()


def test_reference_scores_the_frozen_checkpoint(checkpoint: Path) -> None:
    role = generator(checkpoint)
    rollouts = role.generate(PROMPTS, SAMPLING, "step 1")
    reference = Reference(HfInfer(model_setup(checkpoint), HfConfig()))
    log_probs = reference.log_probs(rollouts.sequences)
    assert log_probs.shape == rollouts.sequences.response_mask.shape and not log_probs.requires_grad
    torch.testing.assert_close(log_probs, rollouts.rollout_log_probs, atol=1e-4, rtol=0)
