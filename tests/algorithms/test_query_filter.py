import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_gspo.algorithms.query_filter import QueryFilterSettings, kept_groups

# Group 4: mean 0.5; group -1: all wrong; group 8: all right; group 3: one sample. Groups are not sorted.
SCORES = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
GROUPS = torch.tensor([4, -1, 8, 4, -1, 8, 3])


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (QueryFilterSettings(), [1, 1, 1, 1, 1, 1, 1]),
        (QueryFilterSettings("std_filter"), [1, 0, 0, 1, 0, 0, 0]),
        (QueryFilterSettings("std_filter", std_threshold=0.5**0.5), [0, 0, 0, 0, 0, 0, 0]),
        (QueryFilterSettings("mean_filter", threshold_down=0.0, threshold_up=1.0), [1, 0, 0, 1, 0, 0, 0]),
        (QueryFilterSettings("mean_filter", threshold_down=0.0), [1, 0, 1, 1, 0, 1, 1]),
        (QueryFilterSettings("mean_filter", threshold_up=0.5), [0, 1, 0, 0, 1, 0, 0]),
        (QueryFilterSettings("mean_filter"), [1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_kept_groups_hand_computed(chosen, expected):
    assert kept_groups(SCORES, GROUPS, chosen).int().tolist() == expected


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_kept_groups_equal_scores_have_no_spread_in_any_precision(value):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        scores = torch.full((7,), value, dtype=dtype)
        assert not bool(kept_groups(scores, torch.zeros(7, dtype=torch.int64), QueryFilterSettings("std_filter")).any())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 3)), min_size=1, max_size=12),
    threshold=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_kept_groups_equal_the_reference_in_any_order(rows, threshold):
    scores, groups = [score / 8 for score, _ in rows], [group for _, group in rows]
    spread = QueryFilterSettings("std_filter", std_threshold=threshold)
    between = QueryFilterSettings("mean_filter", threshold_down=-threshold - 0.01, threshold_up=0.505)
    for chosen, stays in (
        (spread, lambda peers: len(peers) > 1 and statistics.stdev(peers) > threshold),
        (between, lambda peers: -threshold - 0.01 < statistics.mean(peers) < 0.505),
    ):
        expected = [stays([s for s, g in zip(scores, groups, strict=True) if g == own]) for own in groups]
        given_scores, given_groups = torch.tensor(scores, dtype=torch.float64), torch.tensor(groups)
        assert kept_groups(given_scores, given_groups, chosen).tolist() == expected
        assert kept_groups(given_scores.flip(0), given_groups.flip(0), chosen).tolist() == expected[::-1]
