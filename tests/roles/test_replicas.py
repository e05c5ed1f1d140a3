"""Generation on several real processes: order, progress, loss of some, and the weights that they get again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from counting_engine import token
from episode_cases import ECHO, ENVIRONMENTS, NUM_TURNS, TOKENIZER, assert_exact
from ray_roles import DEADLY_VERSION, Trainer, replica, replica_of_letters

from roll_gspo.batch import Completion
from roll_gspo.data.templates import ChatFormat
from roll_gspo.environments.pool import EnvironmentPool
from roll_gspo.errors import WorkerDiedError
from roll_gspo.execution.base import Devices, ExecutionSettings
from roll_gspo.execution.ray.executor import RayExecutor
from roll_gspo.execution.ray.group import kill_family
from roll_gspo.roles.episodes import EpisodeClient, EpisodeLimits, EpisodeRequest
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.replica import Replica
from roll_gspo.roles.replicas import Replicas
from roll_gspo.roles.request_stream import StreamClient
from roll_gspo.roles.weight_sync import BroadcastSync
from roll_gspo.strategies.base import GenerationRequest, Sampling

PROMPTS = [(10 * i, 10 * i + 1) for i in range(100)]
SEEDS = [1000 + 2 * i for i in range(100)]
SAMPLING = Sampling(num_samples=2, max_new_tokens=4)
Version = int
Sample = tuple[tuple[int, ...], Version]


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    made = RayExecutor(ExecutionSettings(devices=(0, 1), devices_per_node=2, call_timeout_s=60))
    yield made
    made.close()


class Engines:
    """Two replicas, linked with a trainer."""

    def __init__(
        self,
        executor: RayExecutor,
        folder: Path,
        dies_in: tuple[int, ...],
        max_restarts: int | None = 3,
        timeout_s: float = 20,
        continue_lost: bool = False,
        size: int = 2,
        make: Callable[[str, tuple[int, ...]], Replica] = replica,
    ) -> None:
        self.folder = folder
        devices = Devices((0, 1)[:size], 1, 2)
        trainer = executor.start_group("actor_train", Trainer, Devices((0,), 1, 2), one_world=True)
        build = partial(make, str(folder), dies_in)
        self.group = executor.start_group("actor_infer", build, devices, one_world=False)
        self.replicas = Replicas(self.group, max_restarts, continue_lost)
        self.generator = Generator(self.replicas, 0, 0, self.replicas.stream)
        self.sync = BroadcastSync(
            trainer,
            self.replicas,
            self.generator,
            workers_per_replica=1,
            timeout_s=timeout_s,
            bucket_bytes=1 << 20,
            checksum=True,
        )

    def samples(self, seen: list[tuple[int, int]] | None = None) -> list[list[Sample]]:
        progress = None if seen is None else lambda done, total: seen.append((done, total))
        handed: list[tuple[int, int, Completion]] = []
        found = self.replicas.generate(PROMPTS, SAMPLING, SEEDS, progress, lambda *sample: handed.append(sample))
        one_by_one = [(p, j, completion) for p, group in enumerate(found) for j, completion in enumerate(group)]
        assert sorted(handed, key=lambda sample: sample[:2]) == one_by_one, "each once, whoever died meanwhile"
        return [[sample_of(completion) for completion in group] for group in found]

    def processes(self) -> set[str]:
        """That were asked for samples."""
        return {file.read_text() for file in self.folder.iterdir()}


def sample_of(completion: Completion) -> Sample:
    """Return the tokens and the weights that sampled all of them."""
    ((version, count),) = completion.version_runs
    assert completion.log_probs == (-float(version),) * count and count == len(completion.token_ids)
    return completion.token_ids, version


def expected(version: int) -> list[list[Sample]]:
    return [
        [(tuple(token(p, seed + j, i) for i in range(4)), version) for j in range(2)]
        for p, seed in zip(PROMPTS, SEEDS, strict=True)
    ]


@pytest.mark.long  # covered by the next test, which also loses replicas
def test_prompts_are_dealt_out_and_come_back_in_order(executor: RayExecutor, tmp_path: Path) -> None:
    engines, seen = Engines(executor, tmp_path, ()), []
    for version in (7, 8):
        engines.sync.push(version)
        assert engines.samples(seen) == expected(version)
    assert seen[-1] == (200, 200) and len(engines.processes()) == 2
    engines.group.close()


def test_lost_replicas_come_back_with_the_current_weights(
    executor: RayExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines = Engines(executor, tmp_path, (1, 3))
    engines.sync.push(5)
    assert engines.samples() == expected(5), "no prompt is missing, none is answered with other weights"
    assert caplog.text.count("starting rank") == 2
    engines.sync.push(6)
    assert engines.samples() == expected(6)
    engines.group.close()


@pytest.mark.long  # the next test loses a replica during a push
def test_replica_lost_before_a_push_gets_the_new_weights(executor: RayExecutor, tmp_path: Path) -> None:
    engines = Engines(executor, tmp_path, ())
    engines.sync.push(1)
    identity = engines.group.member(0).identity
    kill_family(identity.pid, identity.started)
    engines.sync.push(2)
    assert engines.samples() == expected(2)
    engines.group.close()


def test_replica_lost_in_a_transfer_does_not_keep_the_trainer_waiting(executor: RayExecutor, tmp_path: Path) -> None:
    engines = Engines(executor, tmp_path, (), timeout_s=100)
    engines.sync.push(12)
    started = time.monotonic()
    engines.sync.push(DEADLY_VERSION)
    assert time.monotonic() - started < 50
    assert engines.samples() == expected(DEADLY_VERSION)
    engines.group.close()


def test_replicas_that_are_lost_again_and_again_end_the_run(executor: RayExecutor, tmp_path: Path) -> None:
    engines = Engines(executor, tmp_path, (-2,), max_restarts=2)
    engines.sync.push(5)
    with pytest.raises(WorkerDiedError, match="lost in this run, more than max_worker_restarts 2; look for the cause"):
        engines.samples()
    engines.group.close()


def test_a_lost_engine_of_shared_devices_ends_the_run(executor: RayExecutor, tmp_path: Path) -> None:
    engines = Engines(executor, tmp_path, (-2,), max_restarts=None)
    engines.sync.push(5)
    with pytest.raises(WorkerDiedError, match=r"rank 0 was lost, and engines that share devices .* not started again"):
        engines.samples()
    engines.group.close()


def requests(num_tokens: int, count: int = 8) -> list[GenerationRequest]:
    return [GenerationRequest(key, (1, 2), Sampling(1, num_tokens), key) for key in range(count)]


def poll_all(client: StreamClient) -> dict[int, Completion]:
    found: dict[int, Completion] = {}
    while client.outstanding:
        found |= dict(client.poll(5))
    for key, completion in found.items():
        assert completion.token_ids == tuple(token((1, 2), key, i) for i in range(len(completion.token_ids)))
    return found


def poll_until_all_began(client: StreamClient) -> None:
    while not all(completion.token_ids for _, completion in client.partials()):
        client.poll(0)


def test_responses_continue_with_weights_that_arrive_meanwhile(executor: RayExecutor, tmp_path: Path) -> None:
    """Weights are sent between two calls of a client, then while another thread polls."""
    engines = Engines(executor, tmp_path, ())
    engines.sync.push(1)
    client = engines.generator.open_stream()
    client.submit(requests(200))
    poll_until_all_began(client)
    engines.sync.push(2)
    (known,) = client.abort([0])
    assert known.completion.version_runs[0][0] == 1
    with ThreadPoolExecutor(1) as pool:
        polled = pool.submit(poll_all, client)
        for version in (3, 4):
            engines.sync.push(version)
            assert engines.samples() == expected(version), "the thread of the trainer validates meanwhile"
        found = polled.result(60)
    assert sorted(found) == list(range(1, 8))
    for completion in found.values():
        versions, counts = zip(*completion.version_runs, strict=True)
        assert versions == tuple(range(1, 1 + len(versions))) and len(versions) > 1 and sum(counts) == 200
    engines.group.close()


@pytest.mark.parametrize("continue_lost", [pytest.param(False, marks=pytest.mark.long), True])
def test_responses_of_a_lost_replica_start_anew_or_continue(
    executor: RayExecutor, tmp_path: Path, continue_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roll_gspo.roles.replica_stream._REPORT_INTERVAL_S", 0)
    engines = Engines(executor, tmp_path, (30,), continue_lost=continue_lost, size=1)
    engines.sync.push(1)
    client = engines.generator.open_stream()
    client.submit(requests(200))
    poll_until_all_began(client)
    engines.generator.weights_version = 2  # what the restarted replica gets
    runs = {completion.version_runs for completion in poll_all(client).values()}
    assert len(runs) == 1, "all were sampled together"
    assert runs == ({((1, 60), (2, 140))} if continue_lost else {((2, 200),)})
    engines.group.close()


def test_other_threads_go_on_without_the_lost_replica(executor: RayExecutor, tmp_path: Path) -> None:
    engines = Engines(executor, tmp_path, (10,))
    engines.sync.push(1)
    client = engines.generator.open_stream()
    client.submit(requests(100))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(poll_all, client).result(60)
    assert [found[key].version_runs for key in range(8)] == [((1, 100),)] * 8
    assert [engines.group.alive(rank) for rank in range(2)].count(True) == 1
    for version in (2, 3):  # there is nothing to restore the second time
        engines.sync.restore(version)
    assert engines.group.alive(0) and engines.group.alive(1) and engines.samples() == expected(2)
    engines.group.close()


def test_episodes_go_on_without_the_lost_replica(
    executor: RayExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ENVIRONMENTS)
    engines = Engines(executor, tmp_path, (30,), make=replica_of_letters)
    engines.sync.push(1)
    limits = EpisodeLimits(NUM_TURNS, max_prompt_tokens=99, max_tokens=500, max_turn_tokens=40, timeout_s=60.0)
    with EnvironmentPool(ECHO, 1, 16, 30.0, "custom_envs.echo") as pool:
        client = EpisodeClient(
            *(engines.generator.open_stream(), {"echo": pool}, {"echo": limits}, TOKENIZER, ChatFormat(), SAMPLING)
        )
        client.submit([EpisodeRequest(key, (1,), "echo", {}, key, seed=key) for key in range(16)])
        found = poll_episodes(client)
    assert " requests are redone" in caplog.text and sorted(found) == list(range(16))
    for key, completion in found.items():
        assert_exact(completion, seed=key)
        assert [version for version, _ in completion.version_runs] == [1]
    engines.group.close()


def poll_episodes(client: EpisodeClient) -> dict[int, Completion]:
    found: dict[int, Completion] = {}
    while client.outstanding:
        found |= dict(client.poll(5))
    return found
