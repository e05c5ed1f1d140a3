from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from vocabulary_parallel import HIDDEN, VOCAB, Head, fused, reference, solve_sharded

from roll_gspo.strategies import fused_scores, head_products
from roll_gspo.strategies.fused_scores import scores_from_hidden

ALL_AT_ONCE = 2**22


def _assert_equal(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], tolerance: float) -> None:
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block_logits", [ALL_AT_ONCE, 10 * 20, 10 * VOCAB, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_from_hidden_and_their_gradients_equal_float64_autograd(
    monkeypatch: pytest.MonkeyPatch, block_logits: int, temperature: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(fused_scores, "_BLOCK_LOGITS", block_logits)
    head = Head.make(10, dtype=dtype)
    got, want = fused(head, temperature), reference(head, temperature)
    assert {tensor.dtype for tensor in got} == {dtype}
    _assert_equal(got, want, 1e-5 if dtype == torch.float32 else 1e-12)


def test_scores_from_hidden_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_scores, "_BLOCK_LOGITS", 4 * 20)
    head = Head.make(4, padded=64)
    hidden, weight = head.hidden.requires_grad_(), (head.weight * 0.3).requires_grad_()

    def scores(h: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        found = scores_from_hidden(h, w, head.tokens, temperature=0.7, entropy=True, vocab_size=VOCAB)
        return [score for score in found if score is not None]

    assert len(scores(hidden, weight)) == 2
    assert torch.autograd.gradcheck(scores, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_from_hidden_of_16_bits_have_float32_logits(dtype: torch.dtype) -> None:
    head = Head.make(40, dtype=dtype)
    got, want = fused(head, 0.6), reference(head, 0.6)
    assert [tensor.dtype for tensor in got] == [torch.float32] * 2 + [dtype] * 2
    _assert_equal(got[:2], want[:2], 2e-5)
    for ours, exact in zip(got[2:], want[2:], strict=True):
        assert (ours - exact).norm() < torch.finfo(dtype).eps * exact.norm()


def test_scores_from_hidden_without_fp32_lm_head_round_logits_to_bfloat16() -> None:
    head = Head.make(40, dtype=torch.bfloat16)
    log_probs, entropies = scores_from_hidden(
        *head[:3], temperature=1.0, entropy=True, vocab_size=VOCAB, fp32_lm_head=False
    )
    assert entropies is not None
    log_p = (head.hidden @ head.weight.t()).double().log_softmax(-1)
    _assert_equal(
        (log_probs, entropies), (log_p.gather(-1, head.tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)), 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_from_hidden_of_other_dtypes_ignore_fp32_lm_head(dtype: torch.dtype) -> None:
    hidden, weight, tokens, _ = Head.make(10, dtype=dtype)
    on, off = (
        scores_from_hidden(hidden, weight, tokens, temperature=0.6, entropy=True, vocab_size=VOCAB, fp32_lm_head=value)
        for value in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True) if a is not None and b is not None)


def test_float32_logits_convert_a_limited_block_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "_BLOCK_ELEMENTS", 5 * HIDDEN)
    rows = []

    def product(left: torch.Tensor, right: torch.Tensor, float32: bool) -> torch.Tensor:
        rows.append(right.shape[1])
        return head_products.product(left, right, float32)

    monkeypatch.setattr(fused_scores, "product", product)
    head = Head.make(3, dtype=torch.bfloat16)
    log_probs, _ = scores_from_hidden(*head[:3], temperature=1.0, entropy=False, vocab_size=VOCAB)
    assert max(rows) == 5 and sum(rows) == VOCAB
    _assert_equal((log_probs,), (reference(head, 1.0).log_probs,), 1e-5)


def test_scores_from_hidden_take_rows_and_columns_that_are_not_contiguous() -> None:
    head = Head.make(10)
    states, rows = torch.zeros(20, 2 * HIDDEN, dtype=torch.float64), torch.zeros(HIDDEN, VOCAB, dtype=torch.float64)
    states[::2, 1::2], rows[:] = head.hidden, head.weight.t()
    apart = head._replace(hidden=states[::2, 1::2], weight=rows.t())
    assert not apart.hidden.is_contiguous() and not apart.weight.is_contiguous()
    _assert_equal(fused(apart, 1.0), reference(head, 1.0), 1e-12)


@pytest.mark.parametrize("block_logits", [ALL_AT_ONCE, 10 * 20])
def test_scores_from_hidden_give_rows_that_pad_the_head_nothing(
    monkeypatch: pytest.MonkeyPatch, block_logits: int
) -> None:
    monkeypatch.setattr(fused_scores, "_BLOCK_LOGITS", block_logits)
    head = Head.make(10, padded=64)
    got = fused(head, 1.0)
    _assert_equal(got, reference(head, 1.0), 1e-12)
    assert torch.count_nonzero(got.d_weight[VOCAB:]) == 0


@pytest.mark.parametrize("wanted", [0, 1])
def test_scores_from_hidden_differentiate_one_of_both_and_one_input_alone(wanted: int) -> None:
    head = Head.make(10)
    exact = reference(head._replace(upstream=head.upstream * torch.eye(2)[:, wanted, None]), 0.6)
    for trained in ("hidden", "weight"):
        inputs = head._asdict()
        inputs[trained].requires_grad_()
        scores = scores_from_hidden(
            inputs["hidden"], inputs["weight"], head.tokens, temperature=0.6, entropy=True, vocab_size=VOCAB
        )
        of_it = scores[wanted]
        assert of_it is not None
        (gradient,) = torch.autograd.grad(of_it, inputs[trained], head.upstream[wanted])
        torch.testing.assert_close(gradient, exact._asdict()["d_" + trained], rtol=1e-12, atol=1e-12)
        inputs[trained].requires_grad_(False)


def test_scores_from_hidden_without_entropy_have_the_same_log_probs_and_gradients() -> None:
    head = Head.make(10)
    hidden = head.hidden.clone().requires_grad_()
    log_probs, entropies = scores_from_hidden(
        hidden, head.weight, head.tokens, temperature=1.0, entropy=False, vocab_size=VOCAB
    )
    (gradient,) = torch.autograd.grad(log_probs, hidden, head.upstream[0])
    want = reference(head._replace(upstream=head.upstream * torch.tensor([[1.0], [0.0]])), 1.0)
    assert entropies is None
    _assert_equal((log_probs.detach(), gradient), (want.log_probs, want.d_hidden), 1e-12)


def test_scores_from_hidden_stay_exact_where_logits_are_far_from_zero() -> None:
    head = Head.make(10, dtype=torch.float32)
    head.weight[:, 0] = 300.0  # one offset for all logits of a token, which its distribution does not depend on
    got, want = fused(head, 1.0), reference(head, 1.0)
    spacing = 2.0**-15  # of float32 logits above 256
    _assert_equal(got[:2], want[:2], 20 * spacing)
    head.hidden.mul_(1e4)
    for tensor in fused(head, 1.0):
        assert tensor.isfinite().all()


def test_scores_from_hidden_of_no_token_have_zero_gradients() -> None:
    got = fused(Head.make(0), 1.0)
    assert [tuple(tensor.shape) for tensor in got] == [(0,), (0,), (0, HIDDEN), (VOCAB, HIDDEN)]
    assert torch.count_nonzero(got.d_weight) == 0


def test_scores_from_hidden_save_no_logits_and_without_gradient_nothing() -> None:
    head = Head.make(10)
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(head, 1.0)
    assert sorted(sizes) == [10, 10, 10, 10 * HIDDEN, VOCAB * HIDDEN]
    scores = scores_from_hidden(*head[:3], temperature=1.0, entropy=True, vocab_size=VOCAB)
    assert not any(score is None or score.requires_grad for score in scores)


def test_scores_from_hidden_give_a_token_outside_of_the_vocabulary_no_probability() -> None:
    head = Head.make(3, padded=64)
    tokens = torch.tensor([5, VOCAB, -1])
    log_probs, _ = scores_from_hidden(
        head.hidden, head.weight, tokens, temperature=1.0, entropy=False, vocab_size=VOCAB
    )
    assert log_probs.isfinite().tolist() == [True, False, False]


def test_scores_from_hidden_refuse_temperature_zero() -> None:
    head = Head.make(1)
    with pytest.raises(ValueError, match="temperature above 0, not 0"):
        scores_from_hidden(*head[:3], temperature=0.0, entropy=False, vocab_size=VOCAB)


@pytest.mark.parametrize(("world_size", "paddings"), [(2, (62, 128)), (3, (63, 96))])
def test_scores_from_hidden_of_a_head_cut_over_ranks_equal_those_of_the_whole(
    ranks: Ranks, world_size: int, paddings: tuple[int, int]
) -> None:
    """The larger padding leaves the last rank no real row; the blocks differ in number between ranks."""
    cases = [
        (num_tokens, padded, temperature, block_logits)
        for padded in paddings
        for num_tokens, temperature, block_logits in ((10, 0.6, 10 * 8), (10, 1.0, ALL_AT_ONCE), (0, 1.0, 8))
    ]
    by_rank = ranks.run(world_size, solve_sharded, cases)
    for number, (num_tokens, padded, temperature, _) in enumerate(cases):
        found = [solutions[number] for solutions in by_rank]
        want = fused(Head.make(num_tokens, padded), temperature)
        for share in found:
            _assert_equal(share[:2], want[:2], 1e-12)
            assert torch.equal(share.log_probs, found[0].log_probs)
        _assert_equal((torch.stack([share.d_hidden for share in found]).sum(0),), (want.d_hidden,), 1e-12)
        _assert_equal((torch.cat([share.d_weight for share in found]),), (want.d_weight,), 1e-12)
