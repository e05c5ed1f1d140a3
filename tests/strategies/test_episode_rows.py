"""An episode in one row, its given tokens in gaps of the mask, against one row per turn with them in the prompt."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from engine_cases import Checkpoints, model_setup, optimizer_setup, with_random_head
from tiny_models import VOCAB
from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.policy_loss import policy_loss
from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.model import load_model, response_scores
from roll_gspo.strategies.hf.value import HfValue

LOSS = PolicyLossSettings("token", 0.2, 0.27, None, "token-mean", 64)


class Turn(NamedTuple):
    """Tokens that the model was given and sampled, the old log-prob of each sampled one, and their advantage."""

    given: list[int]
    sampled: list[int]
    old: list[float]
    advantage: float


def random_episode(seed: int) -> list[Turn]:
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, most))]

    turns = []
    for _ in range(rng.randint(2, 5)):
        given, sampled = tokens(7), tokens(6)
        turns.append(Turn(given, sampled, [rng.uniform(-5, -3) for _ in sampled], rng.uniform(-1, 1)))
    return turns


def batch_of(rows: list[tuple[list[int], list[Turn]]]) -> TrainBatch:
    """Return rows of (prompt, turns); the given tokens of the first turn belong to the prompt."""
    responses, masks, old, advantages = [], [], [], []
    for _, turns in rows:
        responses.append([*turns[0].sampled, *(token for t in turns[1:] for token in (*t.given, *t.sampled))])
        gaps = [0, *(len(turn.given) for turn in turns[1:])]
        parts = list(zip(turns, gaps, strict=True))
        masks.append([flag for t, gap in parts for flag in [False] * gap + [True] * len(t.sampled)])
        old.append([value for t, gap in parts for value in [9.0] * gap + t.old])
        advantages.append([t.advantage for t, gap in parts for _ in range(gap + len(t.sampled))])
    prompts = [[*prompt, *turns[0].given] for prompt, turns in rows]
    sequences = Sequences.collate(prompts, responses, 0, masks)

    def padded(table: list[list[float]]) -> Tensor:
        width = sequences.response_mask.shape[1]
        return torch.tensor([row + [0.0] * (width - len(row)) for row in table])

    olds = padded(old)
    return TrainBatch(sequences, torch.arange(len(rows)), padded(advantages), olds, olds)


def one_row(turns: list[Turn]) -> TrainBatch:
    return batch_of([([], turns)])


def row_per_turn(turns: list[Turn]) -> TrainBatch:
    rows: list[tuple[list[int], list[Turn]]] = []
    so_far: list[int] = []
    for turn in turns:
        rows.append((list(so_far), [turn]))
        so_far += [*turn.given, *turn.sampled]
    return batch_of(rows)


def passed(model: Any, batch: TrainBatch) -> tuple[list[float], float, dict[str, Tensor]]:
    """Return the log-probs of the sampled tokens in order, the loss, and the gradient of each parameter."""
    model.zero_grad()
    scores = response_scores(model, batch.sequences, 0.7, entropy=False)
    loss, _ = policy_loss(scores.log_probs, None, batch, Denominators.of(batch.response_mask), LOSS)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.log_probs[batch.response_mask].tolist(), loss.item(), gradients


@pytest.mark.parametrize("seed", range(4))
def test_log_probs_loss_and_gradients_are_those_of_single_turns(checkpoint: Checkpoints, seed: int) -> None:
    model, turns = load_model(checkpoint("qwen3_tied"), torch.float32, "sdpa"), random_episode(seed)
    log_probs, loss, gradients = passed(model, one_row(turns))
    expected, expected_loss, expected_gradients = passed(model, row_per_turn(turns))
    assert log_probs == pytest.approx(expected, abs=2e-5)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert (
        gradients.keys() == expected_gradients.keys() and max(float(g.abs().max()) for g in gradients.values()) > 0.01
    )
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5)


def test_values_are_those_of_single_turns(checkpoint: Checkpoints) -> None:
    critic = with_random_head(HfValue(model_setup(checkpoint("qwen3_tied")), optimizer_setup(), HfConfig()))
    turns = random_episode(7)
    whole, single = one_row(turns), row_per_turn(turns)
    values, expected = (critic.values(batch.sequences)[batch.response_mask] for batch in (whole, single))  # type: ignore[attr-defined]
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-5)
