from __future__ import annotations

import pytest
import torch

from roll_gspo.batch import Sequences
from roll_gspo.strategies import log_probs
from roll_gspo.strategies.base import TokenScores
from roll_gspo.strategies.log_probs import place, score_in_micro_batches, token_log_probs


def _reference(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (logits.double() / temperature).log_softmax(-1)
    return log_p.gather(-1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk_logits", [2**24, 3 * 61])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_log_probs_values_and_gradients_equal_float64_autograd(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int, temperature: float
) -> None:
    monkeypatch.setattr(log_probs, "_CHUNK_LOGITS", chunk_logits)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(10, 61, generator=generator)).requires_grad_()
    tokens = torch.randint(61, (10,), generator=generator)
    weight = torch.randn(2, 10, generator=generator)

    got = token_log_probs(logits, tokens, temperature, entropy=True)
    (got[0] * weight[0] + got[1] * weight[1]).sum().backward()
    exact = logits.detach().double().requires_grad_()
    want = _reference(exact, tokens, temperature)
    (want[0] * weight[0] + want[1] * weight[1]).sum().backward()

    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_token_log_probs_ignores_columns_that_pad_the_vocabulary() -> None:
    logits = torch.randn(4, 64).requires_grad_()
    tokens = torch.tensor([0, 60, 5, 9])
    padded, entropy = token_log_probs(logits, tokens, 1.0, entropy=True, vocab_size=61)
    alone, entropy_alone = token_log_probs(logits[:, :61], tokens, 1.0, entropy=True)
    assert torch.equal(padded, alone) and torch.equal(entropy, entropy_alone)
    padded.sum().backward()
    assert torch.count_nonzero(logits.grad[:, 61:]) == 0


def test_token_log_probs_of_no_token_can_be_differentiated() -> None:
    logits = torch.randn(0, 61, requires_grad=True)
    values, entropy = token_log_probs(logits, torch.zeros(0, dtype=torch.int64), 1.0, entropy=False)
    nowhere = torch.zeros(0, dtype=torch.int64)
    place(values, (nowhere, nowhere), (2, 3)).sum().backward()
    assert entropy is None and logits.grad.shape == (0, 61)


def test_token_log_probs_refuses_temperature_zero() -> None:
    with pytest.raises(ValueError, match="temperature above 0, not 0"):
        token_log_probs(torch.randn(1, 3), torch.tensor([0]), 0.0, entropy=False)


def test_score_in_micro_batches_gives_samples_back_in_order_and_pads_like_lengths_together() -> None:
    responses = [[7], [1, 2, 3, 4, 5, 6], [8, 9], [3, 1, 4, 1, 5]]
    sequences = Sequences.collate([[1, 1]] * 4, responses, pad=0)
    widths = []

    def forward(part: Sequences) -> TokenScores:
        widths.append(part.input_ids.shape[1])
        values = torch.where(part.response_mask, part.response_ids, 0).float()
        return TokenScores(values, values + part.response_mask)

    scores = score_in_micro_batches(sequences, 2, forward)
    assert widths == [4, 8]
    assert [row[row > 0].tolist() for row in scores.log_probs] == responses
    assert scores.entropy is not None
    assert torch.equal(scores.entropy, scores.log_probs + sequences.response_mask)
