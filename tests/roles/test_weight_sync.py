"""Weight transfers that fail: who is late, who is killed, and when gloo takes over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from roll_gspo.errors import WeightTransferError, WorkerDiedError, WorkerHungError
from roll_gspo.roles.transfer_watch import TransferWatch
from roll_gspo.roles.weight_sync import BroadcastSync
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_commands import CommandReceiver, CommandSender, LoadedReport
from roll_gspo.strategies.weight_rendezvous import ExportMember


class Call:
    """A `Pending` of a thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._value = work()
        except Exception as error:
            self._error = error

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value

    @property
    def progress(self) -> tuple[int, int]:
        return 0, 0


class Group:
    """A `WorkerGroup` whose objects are in this process."""

    def __init__(self, name: str, objects: Sequence[Any]) -> None:
        self.name, self.size, self._objects = name, len(objects), objects
        self.killed: list[int] = []

    def submit(self, method: str, *args: Any, rank: int | None = None) -> Call:
        ranks = range(self.size) if rank is None else [rank]
        if dead := [each for each in ranks if each in self.killed]:
            raise WorkerDiedError(f"{self.name}: rank {dead[0]} is dead")

        def run() -> Any:
            results = [getattr(self._objects[each], method)(*args) for each in ranks]
            return results[0]

        return Call(run)

    def call(self, method: str, *args: Any, rank: int | None = None) -> Any:
        return self.submit(method, *args, rank=rank).result()

    def host(self, rank: int) -> str:
        return "127.0.0.1"

    def alive(self, rank: int) -> bool:
        return rank not in self.killed

    def lose(self, rank: int, why: str) -> None:
        self.killed.append(rank)

    def restart(self, rank: int) -> None:
        self.killed.remove(rank)

    def kill(self) -> None:
        self.killed += range(self.size)


def watched(address: WeightBroadcastAddress, num_engines: int = 2) -> tuple[TransferWatch, Group, Group]:
    trainer, engines = Group("actor_train", [None, None]), Group("actor_infer", [None] * num_engines)
    groups: Any = trainer, engines
    return TransferWatch(*groups, address, grace_s=0.2), trainer, engines


def forever(*args: object) -> None:
    """Not return; the thread ends with the process."""
    threading.Event().wait()


def die() -> None:
    raise WorkerDiedError("actor_infer: rank 0 died")


@pytest.fixture
def sender() -> CommandSender:
    """A sender with two engines and two trainer ranks."""
    address = WeightBroadcastAddress("127.0.0.1", 0, 3, timeout_s=1.0, backend="nccl", num_trainers=2)
    return CommandSender(address)


def test_engine_that_does_not_return_is_killed(sender: CommandSender) -> None:
    watch, trainer, engines = watched(sender.address)
    sender.fail("weight transfer of version 3: waited 1 s for rank 2 (vllm)")
    with pytest.raises(WeightTransferError, match=r"waited 1 s for rank 2 \(vllm\)"):
        watch.finish(Call(lambda: time.sleep(0.5)), {0: Call(lambda: None), 1: Call(forever)})
    assert engines.killed == [1] and trainer.killed == []


def test_trainer_that_does_not_return_is_killed_too(sender: CommandSender) -> None:
    watch, trainer, _ = watched(sender.address, 1)
    with pytest.raises(WorkerHungError, match=r"actor_train: killed 1\.2 s .* actor_infer: rank 0 died"):
        watch.finish(Call(forever), {0: Call(die)})
    assert trainer.killed == [0, 1]


def test_loss_of_an_engine_ends_the_senders_wait() -> None:
    address = WeightBroadcastAddress("127.0.0.1", 0, 2, timeout_s=60.0, backend="nccl")
    sender = CommandSender(address)
    watch, trainer, _ = watched(sender.address, 1)

    call = Call(lambda: update(sender, None))
    with pytest.raises(WorkerDiedError):
        watch.finish(call, {0: Call(die)})
    with pytest.raises(WeightTransferError, match="actor_infer: rank 0 died"):
        call.result()
    assert trainer.killed == []


def engine(sender: CommandSender, rank: int, execute: Callable[[str, dict[str, Any]], None]) -> Call:
    receiver = CommandReceiver(sender.address.at(rank), f"engine {rank}")
    return Call(lambda: receiver.serve(1, execute))


def update(sender: CommandSender, num_sent: int | None) -> None:
    with sender.session(1):
        sender.num_sent = num_sent
        sender.command("update", {"names": ["a"]})


def test_commands_arrive_in_order_at_every_engine(sender: CommandSender) -> None:
    seen: dict[int, list[tuple[str, dict[str, Any]]]] = {1: [], 2: []}
    calls = [engine(sender, rank, lambda *command, rank=rank: seen[rank].append(command)) for rank in seen]
    with sender.session(1):
        sender.command("start", {"kind": "full"})
        sender.command("update", {"names": ["a"]})
    assert [call.result() for call in calls] == [None, None]
    assert seen[1] == seen[2] == [("start", {"kind": "full"}), ("update", {"names": ["a"]})]


def test_error_of_an_engine_reaches_every_member(sender: CommandSender) -> None:
    def fail(name: str, arguments: dict[str, Any]) -> None:
        raise ValueError("no memory")

    calls = [engine(sender, 1, lambda *command: None), engine(sender, 2, fail)]
    with pytest.raises(WeightTransferError, match=r"rank 2 \(engine 2, .*ValueError: no memory"):
        update(sender, None)
    with pytest.raises(WeightTransferError, match="no memory"):
        calls[0].result()
    with pytest.raises(ValueError, match="no memory"):
        calls[1].result()


def test_engine_with_fewer_tensors_than_sent_is_late(sender: CommandSender) -> None:
    for rank, loaded in ((1, 7), (2, 4)):
        LoadedReport(sender.address.at(rank), worker=0).report(1, loaded)
        engine(sender, rank, forever)
    with pytest.raises(WeightTransferError, match=r"waited 1 s for rank 2 \(.*with 4 of 7 tensors"):
        update(sender, 7)


def test_trainer_rank_that_has_not_begun_is_late(sender: CommandSender) -> None:
    list(sender.exporting([("a", None)], 1))  # type: ignore[list-item]
    for rank in (1, 2):
        LoadedReport(sender.address.at(rank), worker=0).report(1, 7)
        engine(sender, rank, forever)
    with pytest.raises(WeightTransferError, match="the trainer: trainer rank 1 has not begun the export"):
        update(sender, 7)


def test_engine_that_waits_names_the_late_rank_of_the_trainer(sender: CommandSender) -> None:
    list(sender.exporting([("a", None)], 1))  # type: ignore[list-item]
    list(ExportMember(sender.address, 1).exporting([], 1))
    assert "trainer rank 1 (process" in sender._late_trainers(1)
    assert "has exported about 0 tensors" in sender._late_trainers(1)


def test_engine_that_makes_progress_is_waited_for(sender: CommandSender) -> None:
    report = LoadedReport(sender.address.at(1), worker=0)

    def load(name: str, arguments: dict[str, Any]) -> None:
        for count in range(1, 6):
            time.sleep(0.5)
            report.report(1, count)

    calls = [engine(sender, 1, load), engine(sender, 2, lambda *command: None)]
    update(sender, 5)
    assert [call.result() for call in calls] == [None, None]


class Trainer:
    """A trainer whose native backend does not start if `broken`, and that fails in version 13."""

    def __init__(self, broken: bool) -> None:
        self.broken = broken
        self.opened: list[str] = []

    def open_broadcast(
        self, address: WeightBroadcastAddress, bucket_bytes: int | None, checksum: bool
    ) -> WeightBroadcastAddress:
        self.opened.append(address.backend)
        self.sender = CommandSender(address)
        return self.sender.address

    def join_broadcast(self, address: WeightBroadcastAddress, bucket_bytes: int | None) -> None:
        if self.broken and address.backend != "gloo":
            raise WeightTransferError("weight transfer: could not start NCCL within 1 s")

    def send_weights(self, version: int) -> None:
        if version == 13:
            raise WeightTransferError("weight transfer of version 13: rank 1: out of memory")


class Engine:
    """An engine that only counts."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def ready(self) -> None: ...

    def connect(self, address: WeightBroadcastAddress) -> None: ...

    def receive_weights(self, version: int) -> None:
        self.versions.append(version)


class OneReplica:
    """`Replicas` without requests."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.stream = SimpleNamespace(paused=threading.Lock)

    def revive(self, every: bool = False) -> bool:
        lost = list(self.group.killed)
        for rank in lost:
            self.group.restart(rank)
        return bool(lost)


def sync_of(broken: bool, falls_back: bool) -> tuple[BroadcastSync, Trainer, Engine]:
    trainer, engine = Trainer(broken), Engine()
    members: Any = Group("actor_train", [trainer]), OneReplica(Group("actor_infer", [engine]))
    generator: Any = SimpleNamespace(weights_version=-1)
    sync = BroadcastSync(
        *members, generator, workers_per_replica=1, timeout_s=1.0, backend="nccl", falls_back=falls_back
    )
    return sync, trainer, engine


def test_gloo_takes_over_at_the_start_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    sync, trainer, engine = sync_of(broken=True, falls_back=True)
    sync.push(1)
    assert trainer.opened == ["nccl", "gloo"] and engine.versions == [1] and sync.backend == "gloo"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "nccl cannot be started (weight transfer: could not start NCCL" in warning and "gloo" in warning


def test_selected_backend_that_does_not_start_is_an_error() -> None:
    sync, trainer, _ = sync_of(broken=True, falls_back=False)
    with pytest.raises(WeightTransferError, match="could not start NCCL"):
        sync.push(1)
    assert trainer.opened == ["nccl"]


def test_gloo_never_takes_over_in_the_middle() -> None:
    sync, trainer, engine = sync_of(broken=False, falls_back=True)
    sync.push(1)
    with pytest.raises(WeightTransferError, match="out of memory"):
        sync.push(13)
    trainer.broken = True
    with pytest.raises(WeightTransferError, match="could not start NCCL"):
        sync.push(2)
    assert trainer.opened == ["nccl", "nccl"] and engine.versions == [1, 13] and sync.backend == "nccl"
