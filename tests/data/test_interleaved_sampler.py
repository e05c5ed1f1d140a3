"""`InterleavedSampler`: exact shares, epochs per domain, and resuming."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_gspo.data.sampler import InterleavedSampler, PromptSampler

SHARES = {"math": 0.5, "code": 0.3, "choice": 0.15, "format": 0.05}
weights = st.lists(st.integers(1, 1000), min_size=1, max_size=7)
sizes = st.lists(st.integers(1, 20), min_size=1, max_size=15)


def items(*counts: int) -> dict[str, list[tuple[str, int]]]:
    return {name: [(name, i) for i in range(count)] for name, count in zip("abcdefg", counts, strict=False)}


def sampler(seed: int = 0, fingerprint: str = "", **shares: float) -> InterleavedSampler[tuple[str, int]]:
    shares = shares or SHARES
    data = {name: [(name, i) for i in range(7 + 3 * k)] for k, name in enumerate(shares)}
    return InterleavedSampler(data, shares, seed, fingerprint)


@settings(max_examples=50, deadline=None)
@given(weights, sizes)
def test_every_domain_is_within_one_item_of_its_share_after_every_batch(weights, sizes):
    shares = {name: weight / sum(weights) for name, weight in zip("abcdefg", weights, strict=False)}
    drawn = InterleavedSampler(items(*[5] * len(weights)), shares, seed=1)
    counts: Counter[str] = Counter()
    for size in sizes:
        counts.update(name for name, _ in drawn.next_batch(size))
        for name, weight in zip("abcdefg", weights, strict=False):
            assert abs(counts[name] - weight * counts.total() / sum(weights)) < 1


def test_sampled_shares_equal_configured_shares():
    drawn = sampler()
    counts = Counter(name for _ in range(250) for name, _ in drawn.next_batch(8))
    assert counts == {"math": 1000, "code": 600, "choice": 300, "format": 100}


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_every_domain_completes_its_epochs(sizes):
    drawn = sampler(a=0.6, b=0.4)
    lists: dict[str, list[int]] = {"a": [], "b": []}
    for size in [*sizes, 40]:
        batch = drawn.next_batch(size)
        for name in lists:
            lists[name] += sorted(i for n, i in batch if n == name)
    for name, length in (("a", 7), ("b", 10)):
        whole = len(lists[name]) // length
        assert all(n >= whole for n in Counter(lists[name]).values())
        assert max(Counter(lists[name]).values()) <= whole + 1
    assert drawn.epochs()["a"] == (len(lists["a"]) - 1) // 7 and drawn.epochs()[""] == min(drawn.epochs().values())


@settings(max_examples=25, deadline=None)
@given(sizes, sizes)
def test_resumed_sampler_continues_in_the_same_order(before, after):
    drawn = sampler(seed=3)
    for size in before:
        drawn.next_batch(size)
    state = json.loads(json.dumps(drawn.state_dict()))
    resumed = sampler(seed=3)
    resumed.load_state_dict(state)
    assert [resumed.next_batch(n) for n in after] == [drawn.next_batch(n) for n in after]
    assert resumed.state_dict() == drawn.state_dict()


def test_order_depends_on_seed_and_epoch_and_batches_are_shuffled():
    one, again, other = sampler(seed=1), sampler(seed=1), sampler(seed=2)
    batches = [one.next_batch(20) for _ in range(3)]
    assert batches == [again.next_batch(20) for _ in range(3)] != [other.next_batch(20) for _ in range(3)]
    orders = [[name for name, _ in batch] for batch in batches]
    assert orders[0] != orders[1], "each batch is shuffled"
    math = [i for batch in batches for name, i in batch if name == "math"]
    epochs = [math[:7], math[7:14]]
    assert len({tuple(e) for e in epochs}) == 2


def test_domain_with_share_0_is_not_sampled():
    drawn = InterleavedSampler(items(3, 3), {"a": 1.0, "b": 0.0}, seed=0)
    assert {name for name, _ in drawn.next_batch(9)} == {"a"} and drawn.epochs() == {"": 2.0, "a": 2.0}


def test_state_of_other_shares_data_or_seed_raises():
    state = sampler(fingerprint="m", a=0.5, b=0.5).state_dict()
    for other, match in (
        (sampler(fingerprint="m", a=0.6, b=0.4), "domain_interleave_probs are a: 0.6, b: 0.4, .*a: 0.5, b: 0.5"),
        (sampler(fingerprint="m", a=0.5, c=0.5), "domain_interleave_probs are a: 0.5, c: 0.5"),
        (InterleavedSampler(items(7, 9), {"a": 0.5, "b": 0.5}, 0, "m"), "9 prompts of 'b', .*10"),
        (sampler(seed=1, fingerprint="m", a=0.5, b=0.5), "seed is 1, .*0"),
        (sampler(fingerprint="n", a=0.5, b=0.5), "prompts differ"),
        (PromptSampler(range(17), 0, "m"), "domain_interleave_probs .*a: 0.5, b: 0.5"),
    ):
        with pytest.raises(ValueError, match=match):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"domain_interleave_probs are math: 0.5, .*none"):
        sampler().load_state_dict(PromptSampler(range(5), 0).state_dict())
    with pytest.raises(ValueError, match="prompts differ"):
        PromptSampler(range(5), 0, "n").load_state_dict(PromptSampler(range(5), 0, "m").state_dict())


def test_domain_without_items_raises():
    with pytest.raises(ValueError, match="items"):
        InterleavedSampler({"a": [1], "b": []}, {"a": 0.5, "b": 0.5}, 0)
