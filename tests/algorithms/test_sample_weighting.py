import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import advantage_reference as reference

from roll_gspo.algorithms.sample_weighting import (
    SampleMaskSettings,
    comparable_samples,
    kept_samples,
    length_quartiles,
    overlong_penalty,
    sample_weights,
    top_entropy_tokens,
)

SCORES = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
GROUPS = torch.tensor([7, 7, 2, 2, 5, 5, 9])
TRUNCATED = torch.tensor([False, True, False, True, False, False, True])


def test_kept_samples_by_default_are_all():
    assert bool(kept_samples(SCORES, GROUPS, TRUNCATED, SampleMaskSettings()).all())


def test_kept_samples_max_len_mask_goes_by_the_flag():
    kept = kept_samples(SCORES, GROUPS, TRUNCATED, SampleMaskSettings(max_len_mask=True))
    assert torch.equal(kept, ~TRUNCATED)


def test_kept_samples_difficulty_mask_hand_computed():
    # Means 0.5, 0 and 1; the last sample is alone and stays although its score is 1.
    kept = kept_samples(SCORES, GROUPS, TRUNCATED, SampleMaskSettings(difficulty_mask=True))
    assert kept.tolist() == [True, True, False, False, False, False, True]
    strict = SampleMaskSettings(difficulty_mask=True, difficulty_low_threshold=0.5)
    assert kept_samples(SCORES, GROUPS, TRUNCATED, strict).tolist() == [False] * 6 + [True]
    both = SampleMaskSettings(max_len_mask=True, difficulty_mask=True)
    assert kept_samples(SCORES, GROUPS, TRUNCATED, both).tolist() == [True] + [False] * 6


def test_comparable_samples_hand_computed():
    # Of group 7 one is left, of 2 both, of 5 none; 9 was alone from the start.
    valid = torch.tensor([True, False, True, True, False, False, True])
    assert comparable_samples(valid, GROUPS).tolist() == [False, False, True, True, False, False, True]
    assert comparable_samples(torch.ones_like(valid), GROUPS).all()


def test_length_quartiles_hand_computed():
    assert length_quartiles(torch.tensor([8, 1, 5, 3, 2, 6, 7, 4])).tolist() == [3, 0, 2, 1, 0, 2, 3, 1]
    assert length_quartiles(torch.tensor([5, 0, 5, 5])).tolist() == [0, 0, 0, 0], "equal lengths stay together"
    assert length_quartiles(torch.tensor([9, 1, 1, 1, 0])).tolist() == [3, 0, 0, 0, 0]
    assert length_quartiles(torch.tensor([0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("quantile", "expected"),
    [
        (0.2, [[False, True, False], [False, False, False]]),
        (0.4, [[False, True, False], [True, True, False]]),  # a tie
        (0.8, [[False, True, False], [True, True, True]]),
        (1.0, [[True, True, False], [True, True, True]]),
    ],
)
def test_top_entropy_tokens_hand_computed(quantile, expected):
    entropy = torch.tensor([[0.1, 0.9, float("nan")], [0.5, 0.5, 0.2]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert top_entropy_tokens(entropy, mask, quantile).tolist() == expected
    assert not top_entropy_tokens(entropy, mask & False, quantile).any()


def test_top_entropy_tokens_keep_the_exact_fraction():
    entropy = torch.randperm(100).reshape(10, 10) / 100
    for percent in range(1, 101):
        assert int(top_entropy_tokens(entropy, torch.ones(10, 10, dtype=torch.bool), percent / 100).sum()) == percent


def test_sample_weights_hand_computed():
    lengths, kept = torch.tensor([2, 4, 6, 99]), torch.tensor([True, True, True, False])
    by_length = sample_weights(lengths, None, kept, length_loss_weight=True, difficulty_loss_weight=False)
    assert by_length.tolist() == [1.5, 1.0, 0.5, 0.0]
    difficulty = torch.tensor([0.0, -3.0, 5.0, float("nan")])
    by_difficulty = sample_weights(lengths, difficulty, kept, length_loss_weight=False, difficulty_loss_weight=True)
    assert by_difficulty.tolist() == [0.5, 0.5, 2.0, 0.0]
    # 0.75, 0.5 and 1 before scaling: their mean is 0.75.
    both = sample_weights(lengths, difficulty, kept, length_loss_weight=True, difficulty_loss_weight=True)
    torch.testing.assert_close(both, torch.tensor([1.0, 2 / 3, 4 / 3, 0.0]))
    neither = sample_weights(lengths, None, kept, length_loss_weight=False, difficulty_loss_weight=False)
    assert neither.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_sample_weights_of_equal_lengths_are_one_and_of_nothing_zero():
    lengths, none = torch.tensor([3, 3]), torch.zeros(2, dtype=torch.bool)
    weights = sample_weights(lengths, None, ~none, length_loss_weight=True, difficulty_loss_weight=False)
    assert weights.tolist() == [1.0, 1.0]
    weights = sample_weights(lengths, None, none, length_loss_weight=True, difficulty_loss_weight=True)
    assert weights.tolist() == [0.0, 0.0]
    assert weights.dtype == torch.float32


def test_sample_weights_refuse_a_missing_difficulty():
    kept = torch.tensor([True, True])
    for difficulty in (None, torch.tensor([0.5, float("nan")])):
        with pytest.raises(ValueError, match="difficulty_loss_weight: a prompt has no finite difficulty"):
            sample_weights(
                torch.tensor([1, 2]), difficulty, kept, length_loss_weight=False, difficulty_loss_weight=True
            )


rows = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-1, 1), st.integers(0, 40), st.floats(-1, 2), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(rows=rows, by_length=st.booleans(), by_difficulty=st.booleans())
def test_sample_weighting_equals_the_reference_in_any_order(rows, by_length, by_difficulty):
    scores, groups, lengths, difficulty, truncated = (list(column) for column in zip(*rows, strict=True))
    scores = [score / 3 for score in scores]
    chosen = SampleMaskSettings(max_len_mask=True, difficulty_mask=True, difficulty_low_threshold=0.1)

    def ours(order):
        kept = kept_samples(
            torch.tensor(scores, dtype=torch.float64)[order],
            torch.tensor(groups)[order],
            torch.tensor(truncated)[order],
            chosen,
        )
        weights = sample_weights(
            torch.tensor(lengths)[order],
            torch.tensor(difficulty, dtype=torch.float64)[order],
            kept,
            length_loss_weight=by_length,
            difficulty_loss_weight=by_difficulty,
        )
        return kept, weights

    order = torch.arange(len(rows))
    kept, weights = ours(order)
    inside = reference.kept_by_difficulty(scores, groups, 0.1, 1.0)
    assert kept.tolist() == [keep and not cut for keep, cut in zip(inside, truncated, strict=True)]
    theirs = reference.sample_weights(lengths, difficulty if by_difficulty else None, kept.tolist(), by_length)
    assert weights.tolist() == pytest.approx(theirs, rel=1e-6)
    if bool(kept.any()):
        assert float(weights[kept].double().mean()) == pytest.approx(1.0, rel=1e-6)
    permuted = ours(order.flip(0))
    assert torch.equal(permuted[0], kept.flip(0))
    torch.testing.assert_close(permuted[1], weights.flip(0))


def test_overlong_penalty_hand_computed():
    lengths = torch.tensor([0, 60, 61, 80, 99, 100, 130])
    penalties = overlong_penalty(lengths, 100, 40, 2.0)
    torch.testing.assert_close(penalties, torch.tensor([0.0, 0.0, -0.05, -1.0, -1.95, -2.0, -2.0]))
    assert penalties.dtype == torch.float32
    assert overlong_penalty(lengths, 100, 100, 0.0).abs().max() == 0


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 300), longest=st.integers(1, 200), share=st.floats(0.01, 1), factor=st.floats(0, 5))
def test_overlong_penalty_equals_the_reference(length, longest, share, factor):
    buffer = max(1, int(share * longest))
    ours = overlong_penalty(torch.tensor([length]), longest, buffer, factor)
    assert float(ours) == pytest.approx(
        reference.overlong_penalty(length, longest, buffer, factor), rel=1e-6, abs=1e-30
    )
