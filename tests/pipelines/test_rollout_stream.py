"""Groups in flight: order, versions and staleness do not depend on the order of arrival."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_cases import DOMAINS, FILTERS, REJECT_ALL, SAMPLING, Run, states, stream_settings

from roll_gspo.algorithms.query_filter import QueryFilterSettings
from roll_gspo.errors import TrainingError
from roll_gspo.pipelines.rlvr.rollout_stream import CONTINUED, DROPPED, RESTARTED
from roll_gspo.strategies.base import FinishedRequest

few = settings(max_examples=12, deadline=None, derandomize=True)
orders = st.integers(0, 10**6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("filters", [{}, FILTERS, {DOMAINS[0]: FILTERS[DOMAINS[0]]}])
@pytest.mark.parametrize("max_staleness", range(4))
def test_batches_in_order_do_not_depend_on_the_order_of_arrival(
    max_staleness: int, filters: dict[str, QueryFilterSettings], interleaved: bool
) -> None:
    chosen = stream_settings(max_staleness, query_filters=filters, max_rounds=3)
    first = Run(chosen, order=0, interleaved=interleaved).train_all()
    for order in range(1, 5):
        assert states(Run(chosen, order, interleaved).train_all()) == states(first)
    for batch in first:
        assert batch.versions == {max(0, batch.step - 1 - max_staleness)}
    synchronous = Run(stream_settings(0, query_filters=filters, max_rounds=3), 7, interleaved).train_all()
    assert [batch.requests for batch in first] == [batch.requests for batch in synchronous]
    assert bool(filters) == any(batch.dropped for batch in first)


def test_groups_of_a_step_are_drawn_and_seeded_as_one_batch() -> None:
    run = Run(stream_settings(0, num_steps=2))
    for batch in run.train_all():
        first = run.generator.seeds(f"step {batch.step}", 0, SAMPLING.num_samples)[0]
        seeds = [seed for _, of_group in batch.requests for seed in of_group]
        assert seeds == list(range(first, first + 12))


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("max_staleness", range(1, 4))
def test_no_group_starts_that_no_step_can_train(max_staleness: int, in_flight: bool) -> None:
    run = Run(stream_settings(max_staleness, num_steps=4, in_flight=in_flight))
    num_groups = sum(len(batch.groups) for batch in run.train_all())
    num_requests = len(run.engine.order) - 1  # without that of the other client
    assert (num_groups, num_requests) == (4 * 4, 4 * 4 * SAMPLING.num_samples)
    run.pump()
    assert not run.stream.groups and not run.stream.can_start() and run.stream.next_batch() is None


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_first_rejected_groups_fill_a_batch_without_draws_left(max_staleness: int) -> None:
    chosen = stream_settings(max_staleness, num_steps=3, query_filters=REJECT_ALL, max_rounds=2)
    for order in range(4):
        for batch in Run(chosen, order).train_all():
            assert [group.draw for group in batch.groups] == list(range(4))
            assert sorted(group.draw for group in batch.dropped) == list(range(4, 8))
            assert all(group.is_filler for group in batch.groups)


def test_groups_that_pass_come_before_fillers() -> None:
    chosen = stream_settings(1, num_steps=4, query_filters=FILTERS, max_rounds=1)
    batches = Run(chosen).train_all()
    kinds = [[group.is_filler for group in batch.groups] for batch in batches]
    assert all(of_batch == sorted(of_batch) for of_batch in kinds) and any(map(any, kinds))
    assert not any(batch.dropped for batch in batches), "one round draws no replacements"


@few
@given(
    orders, st.integers(1, 3), st.sampled_from(["continue", "restart", "drop"]), st.booleans(), st.sampled_from([3, 16])
)
def test_in_flight_no_token_is_too_old_and_every_prompt_is_accounted_for(
    order: int, max_staleness: int, partial_rollouts: str, filtered: bool, capacity: int
) -> None:
    chosen = stream_settings(
        *(max_staleness, 6),
        in_flight=True,
        partial_rollouts=partial_rollouts,
        query_filters=FILTERS if filtered else {},
    )
    run = Run(chosen, order, capacity=capacity)
    stream, trained, dropped = run.stream, set[int](), set[int]()
    begun = 0
    changing_weights = stream.changing_weights

    def watched() -> Any:
        nonlocal begun
        begun += sum(len(samples) for samples in stream.partials().values())
        return changing_weights()

    stream.changing_weights = watched  # type: ignore[method-assign]
    num_continued = 0
    for _ in range(6):
        batch = run.train()
        assert min(batch.versions) >= batch.step - 1 - max_staleness
        draws = {group.draw for group in batch.groups}
        assert len(draws) == 4 and not draws & (trained | dropped)
        trained |= draws
        dropped |= {group.draw for group in batch.dropped}
        for group in batch.groups:
            for completion in group.completions.values():
                assert sum(tokens for _, tokens in completion.version_runs) == len(completion.token_ids)
                num_continued += len(completion.version_runs) > 1
    counts = {name: stream.take_count(name) for name in (CONTINUED, RESTARTED, DROPPED)}
    expected = {"continue": 0, "restart": RESTARTED, "drop": DROPPED}[partial_rollouts]
    assert [name for name in (RESTARTED, DROPPED) if counts[name]] == ([expected] if begun and expected else [])
    if expected:
        assert counts[str(expected)] == begun and num_continued == counts[CONTINUED] == 0
    elif not filtered:
        assert counts[CONTINUED] == num_continued
    assert not trained & dropped
    if partial_rollouts != "drop":
        assert trained | dropped == set(range(stream.draws[0]))
    assert not stream.groups


@few
@given(orders, st.sampled_from(["continue", "restart", "drop"]))
def test_refresh_leaves_only_present_weights(order: int, partial_rollouts: str) -> None:
    chosen = stream_settings(
        3, 6, in_flight=True, partial_rollouts=partial_rollouts, query_filters=FILTERS, max_rounds=1
    )
    run = Run(chosen, order)
    for step in range(1, 7):
        batch = run.train()
        if step > 3:
            assert min(batch.versions) >= 3 and min(batch.versions) >= step - 1 - 3
        if step == 3:
            for _ in range(order % 5):
                run.pump()
            run.decode_for_another_client()
            run.stream.take_count(RESTARTED)
            run.stream.refresh()
            assert not any(group.completions or group.results for group in run.stream.groups.values())
            assert run.stream.num_generating == len(run.stream.groups) * 3 and run.stream.num_scoring == 0
        elif step > 3:
            assert all(group.is_filler != group.passes(FILTERS[group.domain]) for group in batch.groups)


def test_refresh_ignores_responses_and_scores_that_arrive_late() -> None:
    run = Run(stream_settings(1, 2, in_flight=True))
    run.wait(lambda: run.stream.num_scoring > 2 and run.stream.num_generating > 2)
    run.decode_for_another_client()
    client, _ = run.stream._opened()
    late = cast(Any, client)._finished
    assert late, "ended, but not taken"
    num_begun = sum(len(samples) for samples in run.stream.partials().values()) + len(late)
    num_begun += sum(len(group.completions) for group in run.stream.groups.values())
    run.generator.update_weights(cast(Any, None), 1)
    run.stream.refresh()
    assert run.stream.take_count(RESTARTED) == num_begun
    batch = run.train()
    assert batch.versions == {1}


def test_refreshed_groups_are_no_fillers_until_they_are_scored() -> None:
    run = Run(stream_settings(2, 3, in_flight=True, query_filters=REJECT_ALL, max_rounds=1))
    run.wait(lambda: any(group.is_filler for group in run.stream.groups.values()))
    run.stream.refresh()
    assert not any(group.is_filler for group in run.stream.groups.values())


def test_responses_that_ended_keep_the_deadline_of_a_restarted_group() -> None:
    run = Run(stream_settings(1, 4, in_flight=True, partial_rollouts="restart", groups_per_step=1))
    stream = run.stream
    run.pump()
    client, _ = stream._opened()
    (slot, *_) = stream.groups
    for _ in range(50):
        if cast(Any, client)._finished:
            break
        run.decode_for_another_client()
    ended: list[FinishedRequest] = cast(Any, client)._finished
    slots = {stream._requested[key][0].slot for key, _ in ended}
    before = {number: stream.scheduler.deadline(number) for number in stream.groups}
    stream.scheduler._version = 1
    with stream.changing_weights():
        run.generator.update_weights(cast(Any, None), 1)
    after = {number: stream.scheduler.deadline(number) for number in stream.groups}
    assert slots and all(after[number] == before[number] for number in slots)
    assert slot in stream.groups


def test_pump_reports_an_error_that_another_client_caused() -> None:
    run = Run(stream_settings(1))
    run.pump()

    def fail(seconds: float) -> list[FinishedRequest]:
        raise TrainingError("actor_infer: lost")

    run.engine.advance = fail  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="lost"):
        run.decode_for_another_client()
    with pytest.raises(TrainingError, match="lost"):
        run.pump()


def test_closed_stream_has_no_requests() -> None:
    run = Run(stream_settings(1))
    run.pump()
    run.stream.close()
    assert len(run.engine.outstanding) == 1, "only that of the other client"
