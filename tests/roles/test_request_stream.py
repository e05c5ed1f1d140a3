"""Clients of an engine: routing, order, aborts, weights, errors and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from counting_engine import CountingEngine, token

from roll_gspo.batch import Completion
from roll_gspo.errors import ConfigError, DataError, WorkerHungError
from roll_gspo.execution.base import Pending
from roll_gspo.roles.fair_lock import FairLock
from roll_gspo.roles.local_stream import LocalStream
from roll_gspo.roles.replica import Replica
from roll_gspo.roles.replica_stream import ReplicaStream
from roll_gspo.roles.request_stream import RequestStream, StreamClient
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest, Sampling
from roll_gspo.strategies.batch_streaming import BatchStreaming


def request(key: int, seed: int, tokens: int = 4, partial: Completion | None = None) -> GenerationRequest:
    return GenerationRequest(key, (1, 2), Sampling(1, tokens), seed, partial)


def tokens_of(seed: int, tokens: int = 4) -> tuple[int, ...]:
    return tuple(token((1, 2), seed, position) for position in range(tokens))


def poll_all(client: StreamClient) -> dict[int, Completion]:
    found: dict[int, Completion] = {}
    while client.outstanding:
        found |= dict(client.poll(5))
    return found


@dataclass(frozen=True, eq=False)
class Done:
    """A call that was answered."""

    answer: Any
    progress: tuple[int, int] = (0, 0)

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self.answer


class OneReplica:
    """A `WorkerGroup` of one replica in this process. It answers every call at once."""

    name, size = "actor_infer", 1

    def __init__(self, engine: CountingEngine) -> None:
        self.replica = Replica(engine)  # type: ignore[arg-type]  # it receives no weights

    def submit(self, method: str, *args: Any, rank: int | None = None) -> Pending:
        return Done(getattr(self.replica, method)(*args))

    def call(self, method: str, *args: Any, rank: int | None = None) -> Any:
        return self.submit(method, *args).result()

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Pending]:
        return list(pendings)

    def host(self, rank: int) -> str:
        return "127.0.0.1"

    def alive(self, rank: int) -> bool:
        return True

    def restart(self, rank: int) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


def replica_stream(engine: CountingEngine) -> ReplicaStream:
    return ReplicaStream(OneReplica(engine), lambda: False)


def test_each_client_gets_its_own_responses() -> None:
    stream = LocalStream(CountingEngine())
    first, second = stream.open(), stream.open()
    first.submit([request(key, 10 + key) for key in range(3)])
    second.submit([request(key, 20 + key, tokens=6) for key in range(3)])
    with pytest.raises(ValueError, match="request 1 is outstanding already; give every request another key"):
        first.submit([request(1, 5)])
    assert (first.outstanding, second.outstanding, stream.num_outstanding) == (3, 3, 6)
    late = poll_all(second)
    assert {key: c.token_ids for key, c in late.items()} == {key: tokens_of(20 + key, 6) for key in range(3)}
    assert first.outstanding == 3, "delivered, but not polled yet"
    assert {key: c.token_ids for key, c in poll_all(first).items()} == {key: tokens_of(10 + key) for key in range(3)}
    assert first.poll(0.01) == [] and stream.num_outstanding == 0


def test_short_response_does_not_wait_for_a_long_one() -> None:
    client = LocalStream(CountingEngine()).open()
    client.submit([request(0, 1, tokens=40), request(1, 2, tokens=2)])
    assert [key for key, _ in client.poll(5)] == [1]
    client.submit([request(2, 3, tokens=2)])
    assert [key for key, _ in client.poll(5)] == [2], "admitted while the long one decodes"
    assert list(poll_all(client)) == [0]


def test_one_of_several_engines_holds_few_requests_and_urgent_ones_overtake() -> None:
    engine = CountingEngine(capacity=4, per_advance=1)
    stream = replica_stream(engine)
    slow, urgent = stream.open(), stream.open(urgent=True)
    slow.submit([request(key, 100 + key) for key in range(30)])
    assert slow.poll(0) == [] and len(engine.order) == 6, "4 that decode, and 2 that replace those that end"
    urgent.submit([request(key, key) for key in range(2)])
    assert set(poll_all(urgent)) == {0, 1} and engine.order[6:8] == [0, 1]
    assert set(poll_all(slow)) == set(range(30)) and engine.most < 20


def test_aborted_requests_return_their_tokens_and_can_be_continued() -> None:
    engine = CountingEngine(capacity=2, per_advance=1)
    stream = LocalStream(engine)
    client, other = stream.open(), stream.open()
    known = Completion(tokens_of(9, 1), (0.0,), "partial", None, ((0, 1),))
    client.submit([request(key, key) for key in range(4)] + [request(4, 9, partial=known)])
    other.submit([request(0, 7)])
    client.poll(0)
    partials = {key: c.token_ids for key, c in client.partials()}
    assert partials == {0: tokens_of(0, 1), 1: tokens_of(1, 1), 2: (), 3: (), 4: tokens_of(9, 1)}
    aborted = dict(client.abort([0, 3, 4, 99]))
    assert {key: c.token_ids for key, c in aborted.items()} == {0: tokens_of(0, 1), 3: (), 4: tokens_of(9, 1)}
    assert client.outstanding == 2 and set(poll_all(client)) == {1, 2}
    client.submit([request(0, 0, partial=aborted[0])])
    assert poll_all(client)[0].token_ids == tokens_of(0)
    assert poll_all(other)[0].token_ids == tokens_of(7)


def test_only_engine_of_a_process_holds_every_request() -> None:
    engine = CountingEngine(capacity=4, per_advance=1)
    client = LocalStream(engine).open()
    client.submit([request(key, key) for key in range(30)])
    assert client.poll(0) == [] and engine.order == list(range(30))
    assert set(poll_all(client)) == set(range(30))


@pytest.mark.parametrize(("make", "held"), [(LocalStream, [7]), (replica_stream, [])])
def test_closed_client_leaves_nothing_behind(make: Callable[[CountingEngine], RequestStream], held: list[int]) -> None:
    engine = CountingEngine(capacity=2)
    stream = make(engine)
    client, other = stream.open(), stream.open()
    client.submit([request(key, key, tokens=50) for key in range(9)])
    other.submit([request(0, 7)])
    client.poll(0)
    client.close()
    assert [row.request.seed for row in engine.outstanding.values()] == held, "without those of the closed client"
    assert (client.outstanding, stream.num_outstanding) == (0, 1)
    assert poll_all(other)[0].token_ids == tokens_of(7) and engine.order[-1] == 7


def test_weights_change_while_responses_are_outstanding() -> None:
    engine = CountingEngine(per_advance=1)
    stream = LocalStream(engine)
    client = stream.open()
    client.submit([request(0, 3)])
    client.poll(0)
    with stream.paused():
        assert client.poll(5) == [] and [len(c.token_ids) for _, c in client.partials()] == [1], "nothing is decoded"
        engine.update_weights((), 8)
    assert poll_all(client)[0] == Completion(tokens_of(3), (-0.0, -8, -8, -8), "length", None, ((0, 1), (8, 3)))


def test_rejected_request_fails_its_client_only() -> None:
    stream = LocalStream(CountingEngine())
    wrong, right = stream.open(), stream.open()
    right.submit([request(0, 3)])
    wrong.submit([GenerationRequest(0, (-1,), Sampling(1, 4), 0)])
    assert poll_all(right)[0].token_ids == tokens_of(3)
    with pytest.raises(DataError, match="token ids from -1"):
        wrong.poll(5)
    assert wrong.outstanding == stream.num_outstanding == 0


def test_failed_engine_fails_every_client_and_keeps_no_request() -> None:
    engine = CountingEngine()
    stream = LocalStream(engine)
    clients = [stream.open(), stream.open()]
    for client in clients:
        client.submit([request(0, 3), request(1, -(10**9))])
    for client in clients:
        with pytest.raises(ValueError, match="negative token"):
            client.poll(5)
        assert client.outstanding == 0
    assert not engine.outstanding and stream.num_outstanding == 0
    clients[0].submit([request(0, 3)])
    assert poll_all(clients[0])[0].token_ids == tokens_of(3)


def test_two_threads_use_the_engine_at_the_same_time() -> None:
    stream = LocalStream(CountingEngine())
    found: dict[int, dict[int, Completion]] = {}

    def run(number: int) -> None:
        client = stream.open()
        for start in range(0, 60, 20):
            client.submit([request(key, 100 * number + key) for key in range(start, start + 20)])
            found.setdefault(number, {}).update(poll_all(client))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for number in range(3):
        expected = {key: tokens_of(100 * number + key) for key in range(60)}
        assert {key: c.token_ids for key, c in found[number].items()} == expected


def test_pause_is_not_starved_by_a_thread_that_polls() -> None:
    engine, polls = CountingEngine(per_advance=1), [0]
    stream = LocalStream(engine)
    stop = threading.Event()

    def poll_in_a_loop() -> None:
        client = stream.open()
        client.submit([request(0, 1, tokens=10**9)])
        while not stop.is_set():
            client.poll(0)
            polls[0] += 1
        client.close()

    thread = threading.Thread(target=poll_in_a_loop)
    thread.start()
    counts = []
    for _ in range(50):
        with stream.paused():
            before = polls[0]
            counts.append(len(next(iter(engine.outstanding.values())).tokens) if engine.outstanding else 0)
            assert polls[0] == before
    stop.set()
    thread.join(20)
    assert not thread.is_alive() and counts == sorted(counts)


def test_fair_lock_is_given_in_order_and_names_who_holds_it() -> None:
    lock, order = FairLock("actor_infer", 0.01), []
    assert lock.acquire(0) and lock.acquire(0), "re-entrant"

    def take(number: int) -> None:
        assert lock.acquire(20)
        order.append(number)
        lock.release()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(5)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while len(lock._queue) < number:
            pass
    lock.release()
    assert not order
    lock.release()
    for thread in threads:
        thread.join(20)
    assert order == [0, 1, 2, 3, 4]
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.held():
            holding.set()
            done.wait(20)

    holder = threading.Thread(target=hold, name="rollouts")
    holder.start()
    holding.wait(20)
    with (
        pytest.raises(WorkerHungError, match=r"waited 0.01 s for the engines, which the thread 'rollouts' uses"),
        lock.held(),
    ):
        pass
    done.set()
    holder.join(20)


def test_engine_without_requests_generates_batches() -> None:
    engine = CountingEngine()
    stream = BatchStreaming(engine)
    stream.submit([request(0, 5), request(1, 6), request(2, 7, tokens=3), request(3, 8)])
    assert stream.partials() == [FinishedRequest(key, Completion((), (), "partial")) for key in range(4)]
    assert stream.abort([3, 9]) == [FinishedRequest(3, Completion((), (), "partial"))]
    finished = [(key, c.token_ids) for _ in range(2) for key, c in stream.advance(0)]
    assert finished == [(0, tokens_of(5)), (1, tokens_of(6)), (2, tokens_of(7, 3))] and stream.advance(0) == []
    with pytest.raises(ConfigError, match="CountingEngine: the engine cannot continue a response; implement Streaming"):
        stream.submit([request(0, 5, partial=Completion((1,), (0.0,), "partial"))])
