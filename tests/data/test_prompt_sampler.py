"""`PromptSampler`: epochs, order and resuming."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_gspo.data.sampler import PromptSampler

sizes = st.lists(st.integers(1, 20), min_size=1, max_size=12)


@given(st.integers(1, 30), sizes, st.integers(0, 5))
def test_every_epoch_is_a_permutation_for_any_batch_sizes(num_items, batch_sizes, seed):
    sampler = PromptSampler(range(num_items), seed)
    drawn = [item for size in batch_sizes for item in sampler.next_batch(size)]
    assert len(drawn) == sum(batch_sizes)
    for start in range(0, len(drawn) - num_items + 1, num_items):
        assert sorted(drawn[start : start + num_items]) == list(range(num_items))
    assert len(set(drawn[:num_items])) == min(num_items, len(drawn))


@given(st.integers(1, 30), sizes, sizes, st.integers(0, 5))
def test_resumed_sampler_continues_in_the_same_order(num_items, before, after, seed):
    sampler = PromptSampler(range(num_items), seed)
    for size in before:
        sampler.next_batch(size)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = PromptSampler(range(num_items), seed)
    resumed.load_state_dict(state)
    assert [resumed.next_batch(n) for n in after] == [sampler.next_batch(n) for n in after]
    assert resumed.state_dict() == sampler.state_dict()


def test_order_depends_on_seed_and_epoch():
    first = PromptSampler(range(50), 1)
    epochs = [first.next_batch(50), first.next_batch(50)]
    assert epochs[0] != epochs[1] and epochs[0] != list(range(50))
    assert epochs[0] == PromptSampler(range(50), 1).next_batch(50) != PromptSampler(range(50), 2).next_batch(50)


def test_state_of_other_data_raises():
    state = PromptSampler(range(5), 0).state_dict()
    with pytest.raises(ValueError, match=r"6 prompts, .*5"):
        PromptSampler(range(6), 0).load_state_dict(state)


def test_empty_items_raise():
    with pytest.raises(ValueError, match="at least one"):
        PromptSampler([], 0)
