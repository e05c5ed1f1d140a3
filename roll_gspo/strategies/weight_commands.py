"""Commands of a weight transfer whose bytes travel between GPUs.

The trainer's rank 0 posts commands and every engine executes them: the calls of vLLM's weight-transfer protocol. They
go through the store of `weight_rendezvous`, so late or failed engines are named as in a weight broadcast.

    sender = CommandSender(WeightBroadcastAddress("127.0.0.1", port=0, world_size=2, backend="nccl"))  # trainer, rank 0
    receiver = CommandReceiver(sender.address)  # engine
    with sender.session(version=1): sender.command("start", {...})  # at the same time as ...
    receiver.serve(1, execute)  # ... this, which calls execute("start", {...})
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_rendezvous import (
    TransferMember,
    TransferReceiver,
    TransferSender,
    as_transfer_error,
    title,
)
from roll_gspo.strategies.weight_update import CONNECTING

_END = "end"

# Called with the name of a command and its arguments, plain JSON values.
Execute = Callable[[str, dict[str, Any]], None]


class CommandSender(TransferSender):
    """Posts commands to all engines. One of several threads may use it at a time.

    Args:
        address: its `host` is this machine's address as seen by the engines.

    Raises:
        WeightTransferError: the port is in use.
    """

    def __init__(self, address: WeightBroadcastAddress) -> None:
        super().__init__(address, _engines(address))
        self._version = CONNECTING
        self._given_up = ""
        self.num_sent: int | None = None
        """Tensors that every engine should have received by now; None if a command contains all its tensors."""

    @contextmanager
    def session(self, version: int) -> Iterator[None]:
        """Let every engine `serve` this version in the block. An exception in the block reaches them as text."""
        self._begin()
        self._version, self._given_up = version, ""
        try:
            yield
            self._post(json.dumps({"command": _END}))
        except BaseException as error:
            wrapped = as_transfer_error(error, version)
            text = str(wrapped) or type(error).__name__
            self._post_error(json.dumps({"error": text}), text)
            if wrapped is error:
                raise
            raise wrapped from error

    def command(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Post a command once every engine serves the version; return when every engine has executed it.

        Raises:
            WeightTransferError: an engine failed, is late or waits for another version.
        """
        if not self._step:
            self._check_usable()
            self._await_receivers(self._version)
        self._post(json.dumps({"command": name, "arguments": arguments}))
        self._await_receivers(self._version)

    def give_up(self, why: str) -> None:
        """End the wait of another thread in `command`."""
        self._given_up = why

    def fail(self, text: str) -> None:
        """Tell the controller of an error while the session is still open, and refuse later sessions."""
        self._broken = self._broken or text
        self._post_failure(text)

    def _positions(self) -> dict[int, int]:
        if self._given_up:
            raise WeightTransferError(f"{title(self._version)}: {self._given_up}")
        return {} if self.num_sent is None else self._num_loaded(range(1, self.address.world_size))

    def _late(self, ranks: Sequence[int], version: int) -> str:
        if self.num_sent is None:
            return super()._late(ranks, version)
        width = self.address.workers_per_engine
        loaded = self._num_loaded([worker for rank in ranks for worker in range(rank, rank + width)])
        if min(loaded.values()) >= self.num_sent:
            return f"the trainer: {self._late_trainers(version)}"
        late = [worker for worker, count in loaded.items() if count == min(loaded.values())]
        return f"{super()._late(late, version)}, with {min(loaded.values())} of {self.num_sent} tensors"

    def _num_loaded(self, workers: Sequence[int]) -> dict[int, int]:
        found = {}
        for rank in workers:
            version, count = json.loads(self._value(f"loaded/{rank}") or "[-2, 0]")
            found[rank] = count if version == self._version else 0
        return found


class CommandReceiver(TransferReceiver):
    """Executes the commands for one engine.

    Args:
        address: `CommandSender.address` with the `first_rank` of the engine.
        name: name in errors.

    Raises:
        WeightTransferError: the sender's store cannot be reached.
    """

    def __init__(self, address: WeightBroadcastAddress, name: str = "") -> None:
        super().__init__(address, address.first_rank, len(_engines(address)), name)

    def serve(self, version: int, execute: Execute) -> None:
        """Execute the commands of a version until the sender ends it.

        Raises:
            WeightTransferError: the sender failed or is late, or another engine failed. An exception of `execute`
                propagates unchanged. The sender raises the same text.
        """
        self._begin()
        try:
            self._check_usable()
            while True:
                self._report(version)
                message = json.loads(self._next_message(version))
                if "error" in message:
                    raise WeightTransferError(message["error"])
                self._step += 1
                if message["command"] == _END:
                    return
                execute(message["command"], message["arguments"])
        except BaseException as error:
            self._report_error(version, error)
            raise


class LoadedReport(TransferMember):
    """Reports how many tensors a worker of an engine has loaded."""

    def __init__(self, address: WeightBroadcastAddress, worker: int) -> None:
        super().__init__(address, address.first_rank + worker, hosts_store=False)
        self._introduce(f"vllm worker {worker}")

    def report(self, version: int, count: int) -> None:
        """Set the number of tensors of `version` that this worker has loaded."""
        self._store.set(f"loaded/{self._rank}", json.dumps([version, count]))


def _engines(address: WeightBroadcastAddress) -> range:
    """Return the rank of the first worker of each engine."""
    return range(1, address.world_size, address.workers_per_engine)
