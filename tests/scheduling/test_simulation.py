"""The simulation against cases computed by hand, and its bounds for any workload."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_gspo.scheduling.assignment import EngineLoads
from roll_gspo.scheduling.engine import DecodeEngine, Request
from roll_gspo.scheduling.lengths import LogNormalLengths, RecordedLengths
from roll_gspo.scheduling.simulation import Cluster, Schedule, Simulated, simulate
from roll_gspo.scheduling.waiting import waiting_side

HUNDRED = ((100,),)  # one response of 100 tokens per group: 1 s at 10 ms per decode step


def simulated(
    lengths: tuple[tuple[int, ...], ...] = HUNDRED,
    *,
    staleness: int = 0,
    mode: str = "one_step_off",
    partial: str = "continue",
    groups: int = 1,
    engines: int = 1,
    capacity: int = 64,
    request_s: float = 0.0,
    train_s: float = 1.0,
    sync_s: float = 0.0,
    prompt: float = 0.0,
) -> Simulated:
    """Simulate 12 steps whose trainer takes `train_s` for 100 tokens."""
    cluster = Cluster(engines, capacity, 0.01, request_s, 100 / train_s, sync_s)
    schedule = Schedule(groups, prompt, staleness, mode, partial)  # type: ignore[arg-type]
    return simulate(cluster, schedule, RecordedLengths(lengths), 12, staleness + 1)


@pytest.mark.parametrize("mode", ["one_step_off", "in_flight"])
@pytest.mark.parametrize(("train_s", "sync_s"), [(1.0, 0.0), (0.5, 0.2), (3.0, 0.5)])
def test_without_staleness_a_step_is_generation_plus_training_plus_transfer(
    mode: str, train_s: float, sync_s: float
) -> None:
    result = simulated(mode=mode, train_s=train_s, sync_s=sync_s)
    step = 1.0 + train_s + sync_s
    assert result.step_s == pytest.approx(step)
    assert result.trainer_idle == pytest.approx(1.0 / step)
    assert result.engines_idle == pytest.approx(train_s / step)
    assert result.tokens_per_s == pytest.approx(100 / step)
    assert result.staleness == {0: 1.0}


@pytest.mark.parametrize(("train_s", "sync_s"), [(1.0, 0.0), (0.5, 0.2), (3.0, 0.5)])
def test_one_step_off_takes_the_slower_side(train_s: float, sync_s: float) -> None:
    result = simulated(staleness=1, train_s=train_s, sync_s=sync_s)
    step = max(1.0, train_s) + sync_s
    assert result.step_s == pytest.approx(step)
    assert result.trainer_idle == pytest.approx((step - sync_s - train_s) / step)
    assert result.engines_idle == pytest.approx((step - sync_s - 1.0) / step)
    assert result.staleness == {1: 1.0}


def test_one_step_off_waits_for_the_longest_response() -> None:
    result = simulated(((100, 100, 100, 400),), staleness=1, train_s=0.1)
    assert result.step_s == pytest.approx(4.0)
    assert result.running == pytest.approx(7.0 / 4.0)


def test_in_flight_fills_the_engine() -> None:
    """One response at a time: the engine decodes 300 tokens per group without a pause, whatever their order is."""
    lengths = ((100, 100, 100),)
    result = simulated(lengths, staleness=2, mode="in_flight", capacity=1, train_s=0.1)
    assert result.step_s == pytest.approx(3.0)
    assert result.engines_idle == pytest.approx(0.0)
    assert max(result.staleness) <= 2


def test_slow_trainer_reaches_the_bound() -> None:
    """Training takes longer than generation: every batch was generated as early as the bound allows."""
    result = simulated(staleness=3, mode="in_flight", train_s=5.0)
    assert result.step_s == pytest.approx(5.0)
    assert result.staleness == {3: 1.0}
    assert result.trainer_idle == pytest.approx(0.0)


def test_more_requests_take_longer_steps() -> None:
    """Four requests: 10 ms + 4 * 5 ms per decode step for 50 tokens, then 10 ms + 5 ms for 50 more of the last."""
    result = simulated(((50, 50, 50, 100),), request_s=0.005, train_s=0.4)
    assert result.step_s == pytest.approx(50 * 0.03 + 50 * 0.015 + 2.5 * 0.4)


def test_requests_above_capacity_wait() -> None:
    result = simulated(((100,) * 4,), engines=1, capacity=2, train_s=0.25)
    assert result.step_s == pytest.approx(2.0 + 1.0)
    result = simulated(((100,) * 4,), engines=2, capacity=2, train_s=0.25)
    assert result.step_s == pytest.approx(1.0 + 1.0)


def test_prompts_are_trained_too() -> None:
    assert simulated(prompt=100).step_s == pytest.approx(1.0 + 2.0)


def test_token_staleness_of_a_response_that_spans_updates() -> None:
    """G = 1, n = 1, training and weight transfer take no time: groups of 1 s and 2 s start at once.

    From then on, an update happens at the end of every response, so that responses continue with other weights.
    """
    result = simulated(((100,), (200,)), staleness=1, mode="in_flight", train_s=1e-9, capacity=2)
    assert set(result.staleness) == {0, 1}
    assert 0 < result.staleness[1] < 1
    assert result.discarded == 0


@pytest.mark.parametrize("partial", ["restart", "drop"])
def test_discarded_tokens_are_counted(partial: str) -> None:
    lengths = ((100,), (150,), (300,))
    result = simulated(lengths, staleness=1, mode="in_flight", partial=partial, train_s=0.2)
    assert 0 < result.discarded < 1
    assert simulated(lengths, staleness=1, mode="in_flight", train_s=0.2).discarded == 0


def test_tokens_by_version() -> None:
    engine = DecodeEngine(0.01, 0.0)
    request = Request(0, 100)
    engine.admit(request)
    engine.advance(0.3)
    engine.update_weights()
    engine.update_weights()
    engine.advance(0.5)
    engine.update_weights()
    engine.advance(1.0)
    assert engine.pop_complete() == [request]
    tokens = engine.tokens_by_version(request)
    assert [version for version, _ in tokens] == [0, 1, 2, 3]
    assert [count for _, count in tokens] == pytest.approx([30, 0, 20, 50])


@settings(max_examples=40, deadline=None)
@given(
    staleness=st.integers(0, 4),
    mode=st.sampled_from(["one_step_off", "in_flight"]),
    partial=st.sampled_from(["continue", "restart", "drop"]),
    groups=st.integers(1, 4),
    engines=st.integers(1, 3),
    capacity=st.integers(1, 5),
    train_s=st.floats(0.01, 10),
    sync_s=st.floats(0, 1),
    lengths=st.lists(st.lists(st.integers(1, 2000), min_size=1, max_size=3).map(tuple), min_size=1, max_size=9),
)
def test_bounds_hold_for_any_workload(staleness: int, mode: str, partial: str, lengths: list, **rest: float) -> None:
    result = simulated(tuple(lengths), staleness=staleness, mode=mode, partial=partial, **rest)  # type: ignore[arg-type]
    assert sum(result.staleness.values()) == pytest.approx(1.0)
    assert set(result.staleness) <= ({staleness} if mode == "one_step_off" else set(range(staleness + 1)))
    assert 0 <= result.trainer_idle <= 1 and 0 <= result.engines_idle <= 1 and 0 <= result.discarded < 1
    assert 0 < result.running <= rest["capacity"]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.tuples(st.booleans(), st.integers(1, 9))))
def test_requests_go_to_the_engine_with_the_fewest_tokens(
    capacities: list[int], operations: list[tuple[bool, int]]
) -> None:
    loads, free, fast = [0] * len(capacities), list(capacities), EngineLoads(capacities)
    assigned: list[tuple[int, int]] = []
    for is_release, tokens in operations:
        if is_release and assigned:
            engine, amount = assigned.pop(tokens % len(assigned))
            fast.release(engine, amount)
            loads[engine], free[engine] = loads[engine] - amount, free[engine] + 1
            continue
        chosen = min((e for e, room in enumerate(free) if room), key=lambda e: loads[e], default=None)
        assert fast.assign(tokens) == chosen
        if chosen is not None:
            assigned.append((chosen, tokens))
            loads[chosen], free[chosen] = loads[chosen] + tokens, free[chosen] - 1


def test_log_normal_lengths() -> None:
    lengths = LogNormalLengths(median=400, sigma=1.0, limit=1000, samples_per_group=8, seed=3)
    groups = list(islice(lengths.groups(), 500))
    assert groups == list(islice(lengths.groups(), 500))
    every = sorted(length for group in groups for length in group)
    assert all(len(group) == 8 for group in groups)
    assert every[0] >= 1 and every[-1] == 1000
    assert every[len(every) // 2] == pytest.approx(400, rel=0.1)
    assert {*next(LogNormalLengths(50, 0.0, 1000, 4).groups())} == {50}


def test_a_thousand_engines() -> None:
    """Events per response, not per token: 8,192 responses of up to 65,536 tokens per step on 768 engines."""
    cluster = Cluster(768, 256, 0.01, 5e-5, 256 * 4000, 2)
    lengths = LogNormalLengths(3200, 1.0, 65536, 16)
    result = simulate(cluster, Schedule(512, 0, 1, "in_flight", "continue"), lengths, steps=2, warm_up=1)
    assert result.step_s > 0


@pytest.mark.parametrize(
    ("generate_s", "train_s", "trainer", "engines", "step"),
    [(2.0, 1.0, 1 / 2, 0.0, 2.0), (1.0, 2.0, 0.0, 1 / 2, 2.0)],
)
def test_waiting_side_one_step_off(
    generate_s: float, train_s: float, trainer: float, engines: float, step: float
) -> None:
    """A step takes the slower side; lengths vary between steps, so that the shares do too."""
    schedule = Schedule(32, 0.0, 1, "one_step_off", "continue")
    waiting = waiting_side(generate_s, train_s, 0.0, 8, schedule)
    assert waiting.trainer == pytest.approx(trainer, abs=0.1)
    assert waiting.engines == pytest.approx(engines, abs=0.1)
    assert waiting.relative_step == pytest.approx(step / (generate_s + train_s), abs=0.05)


def test_waiting_side_in_flight_does_not_wait_for_the_longest_response() -> None:
    one_step_off = waiting_side(3.0, 1.0, 0.1, 8, Schedule(512, 0.0, 2, "one_step_off", "continue"))
    in_flight = waiting_side(3.0, 1.0, 0.1, 8, Schedule(512, 0.0, 2, "in_flight", "continue"))
    assert in_flight.relative_step < 0.8 * one_step_off.relative_step
    assert in_flight.trainer < one_step_off.trainer
