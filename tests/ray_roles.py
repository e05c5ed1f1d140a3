"""Small roles that worker processes can import."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from counting_engine import CountingEngine
from torch import Tensor
from torch import distributed as dist

from roll_gspo.errors import ConfigError, TrainingError
from roll_gspo.roles.replica import Replica
from roll_gspo.strategies.base import FinishedRequest
from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress, WeightBroadcastReceiver, WeightBroadcastSender


class Rank:
    """A rank whose methods compute, fail, hang or die."""

    def __init__(self, text: str = "") -> None:
        self.text = text
        self.thread = threading.get_ident()

    def surroundings(self) -> dict[str, str]:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "MARK")
        seen = {name: os.environ.get(name, "") for name in (*names, "CUDA_VISIBLE_DEVICES")}
        return seen | {"cwd": os.getcwd(), "node": os.environ.get("RAY_NODE_ID", "")}

    def in_building_thread(self) -> bool:
        return self.thread == threading.get_ident()

    def pid(self) -> int:
        return os.getpid()

    def sum_over_ranks(self, batch: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Return the batch times the sum of (rank + 1) over all ranks."""
        total = batch * (dist.get_rank() + 1)
        dist.all_reduce(total)
        for done in range(5):
            if progress is not None:
                progress(done + 1, 5)
                time.sleep(0.2)
        return total

    def fail(self, kind: str, only: int) -> None:
        logging.getLogger("roll_gspo.roles").warning("about to fail")
        if dist.get_rank() != only:
            return
        if kind == "own":
            raise TrainingError("20 optimizer steps in a row were not finite")
        if kind == "disk":
            raise OSError(28, "No space left on device", "/model.pt")
        raise ZeroDivisionError("unexpected")

    def die(self, only: int, number: int = signal.SIGKILL) -> None:
        if dist.get_rank() == only:
            os.kill(os.getpid(), number)
        dist.barrier()

    def hang(self, only: int) -> None:
        if dist.get_rank() == only:
            time.sleep(600)

    def close(self) -> None:
        if self.text:
            Path(self.text).write_text("closed")


class Loner:
    """A replica whose process dies in call number `at`, if the file `mark` does not exist yet."""

    def __init__(self, mark: str = "", at: int = 0) -> None:
        self.mark, self.at, self.calls = mark, at, 0

    def double(self, numbers: list[int]) -> tuple[list[int], int]:
        self.calls += 1
        if self.calls == self.at and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return [2 * number for number in numbers], os.getpid()

    def world(self) -> tuple[bool, str]:
        return dist.is_initialized(), os.environ.get("RANK", "")

    def environment(self, name: str) -> str:
        return os.environ.get(name, "")

    def close(self) -> None: ...


DEADLY_VERSION = 13  # the first replica that receives it dies


class Sampler(CountingEngine):
    """An engine that receives weights and whose process dies in the calls `dies_in` of `advance`, each once.

    Args:
        folder: remembers, beyond a process, how many calls there were, and in which weights came.
        dies_in: numbers of calls with outstanding requests, over all processes; a negative one kills in every call
            from there on.
    """

    def __init__(self, folder: str, dies_in: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.folder, self.dies_in = Path(folder), dies_in

    def advance(self, seconds: float) -> list[FinishedRequest]:
        if self.outstanding:
            number = self._next_number()
            if number in self.dies_in or any(number >= -n for n in self.dies_in if n < 0):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().advance(seconds)

    def _next_number(self) -> int:
        """Return the number of this call; it is unique across processes."""
        for number in itertools.count():
            with suppress(FileExistsError), (self.folder / str(number)).open("x") as file:
                file.write(str(os.getpid()))
                return number
        raise AssertionError

    def connect(self, address: WeightBroadcastAddress) -> None:
        self.receiver = WeightBroadcastReceiver(address)

    def receive(self, version: int) -> None:
        if version == DEADLY_VERSION and not (self.folder / "deadly").exists():
            (self.folder / "deadly").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with self.receiver.receive(version) as weights:
            ((_, tensor),) = weights
        self.version = int(tensor)


class Trainer:
    """A rank with a single weight: its version."""

    def __init__(self) -> None:
        self.sender: WeightBroadcastSender | None = None
        self.checksum = False

    def open_broadcast(
        self, address: WeightBroadcastAddress, bucket_bytes: int, checksum: bool
    ) -> WeightBroadcastAddress:
        self.sender, self.checksum = WeightBroadcastSender(address, bucket_bytes), checksum
        return self.sender.address

    def join_broadcast(self, address: WeightBroadcastAddress, bucket_bytes: int) -> None: ...

    def send_weights(self, version: int) -> None:
        if self.sender is not None:
            self.sender.send([("version", torch.tensor(version))], version, self.checksum)

    def close(self) -> None: ...


def replica(folder: str, dies_in: tuple[int, ...]) -> Replica:
    """Build a worker of `actor_infer`."""
    return Replica(Sampler(folder, dies_in))


def replica_of_letters(folder: str, dies_in: tuple[int, ...]) -> Replica:
    """Build a worker of `actor_infer` whose tokens are letters of the byte tokenizer."""
    sampler = Sampler(folder, dies_in)
    sampler.letters = True
    return Replica(sampler)


def refuse() -> Rank:
    """Fail to build a role."""
    raise ConfigError("strategy_config.max_num_seqs: 0 is not positive; set 1 or more")
