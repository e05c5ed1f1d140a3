"""Transfer of the trainer's weights to the generation engine, in one process or across processes."""

from __future__ import annotations

import logging
from typing import Protocol

from roll_gspo.errors import WeightTransferError, WorkerError
from roll_gspo.execution.base import WorkerGroup
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.replicas import Replicas
from roll_gspo.roles.transfer_watch import TransferWatch
from roll_gspo.strategies.weight_broadcast_address import Backend, WeightBroadcastAddress

logger = logging.getLogger(__name__)


class WeightSync(Protocol):
    """Transfer of the trainer's weights to the generation engine."""

    def push(self, version: int) -> None:
        """Send the trainer's current weights. The engine generates only with these afterwards.

        Raises:
            WeightTransferError: the engine did not receive the weights.
        """
        ...

    def restore(self, version: int) -> None:
        """Restart lost engines and send the trainer's current weights, which are those of `version`, to all engines.

        No-op if no engine is lost. Call it while the trainer is idle.
        """
        ...


class InProcessSync:
    """Transfer within one process: tensors are passed by reference."""

    def __init__(self, actor: Actor, generator: Generator) -> None:
        self._actor = actor
        self._generator = generator

    def push(self, version: int) -> None:
        """Transfer the current weights as `version`."""
        self._generator.update_weights(self._actor.weights(), version)

    def restore(self, version: int) -> None:
        """Do nothing: the engine lives as long as the trainer."""


class BroadcastSync:
    """Transfer across processes: all ranks of the trainer export, rank 0 sends, every worker of every replica receives.

    A replica that is lost during a transfer or during generation is restarted. All replicas then receive the weights
    again. A worker that does not return from a failed transfer is killed.

    Args:
        trainer: ranks of `actor_train`.
        replicas: the engines.
        generator: role that generates on them.
        workers_per_replica: processes per engine (its tensor-parallel size).
        timeout_s: time limit of every wait of one side for the other.
        bucket_bytes: maximum size of a piece that is sent at once; None for the default of the backend.
        checksum: verify every piece on arrival; gloo only.
        backend: what moves the bytes.
        falls_back: use gloo if the backend cannot be started. Once it has started, its errors are errors.
    """

    def __init__(
        self,
        trainer: WorkerGroup,
        replicas: Replicas,
        generator: Generator,
        *,
        workers_per_replica: int,
        timeout_s: float,
        bucket_bytes: int | None = None,
        checksum: bool = False,
        backend: Backend = "gloo",
        falls_back: bool = False,
    ) -> None:
        self._trainer = trainer
        self._replicas = replicas
        self._generator = generator
        self._workers_per_replica = workers_per_replica
        self._timeout_s = timeout_s
        self._pieces = bucket_bytes, checksum
        self.backend: Backend = backend
        self._falls_back = falls_back and backend != "gloo"
        self._watch: TransferWatch | None = None
        replicas.restore_weights = self._restore

    def push(self, version: int) -> None:
        """Transfer the current weights as `version`. No replica computes meanwhile; outstanding requests continue."""
        with self._replicas.stream.paused():
            self._push(version)

    def restore(self, version: int) -> None:
        """Restart lost replicas, then send the current weights to all."""
        group = self._replicas.group
        if not all(group.alive(rank) for rank in range(group.size)):
            self.push(version)

    def _push(self, version: int) -> None:
        # A loss found here costs nothing, and the other replicas keep their requests.
        if self._replicas.revive():
            self._watch = None
        group = self._replicas.group
        while True:
            connecting = False
            try:
                # In a transfer the sender would wait for a lost replica.
                group.call("ready")
                connecting = self._watch is None
                watch = self._watch = self._watch or self._connect()
                connecting = False
                calls = {rank: group.submit("receive_weights", version, rank=rank) for rank in range(group.size)}
                watch.finish(self._trainer.submit("send_weights", version), calls)
            except (WorkerError, WeightTransferError) as error:
                self._watch = None
                # the others may hold part of a version, so they are unusable, too
                lost = self._replicas.revive(every=True)
                if connecting and self._falls_back:
                    self._fall_back(error)
                elif not lost:
                    raise
                else:
                    logger.warning("%s; weights of version %d are sent again", error, version)
            else:
                self._generator.weights_version = version
                return

    def _restore(self) -> None:
        self._watch = None
        self.push(self._generator.weights_version)

    def _fall_back(self, error: Exception) -> None:
        logger.warning(
            "weight_transfer.backend: auto: %s cannot be started (%s); weights travel through host memory (gloo), "
            "which is slower; set gloo to silence this, or %s to make it an error",
            *(self.backend, error, self.backend),
        )
        self.backend, self._falls_back = "gloo", False

    def _connect(self) -> TransferWatch:
        """Open a new transfer, as its members are fixed after the first use."""
        group, width = self._replicas.group, self._workers_per_replica
        wanted = WeightBroadcastAddress(
            self._trainer.host(0),
            0,
            1 + group.size * width,
            timeout_s=self._timeout_s,
            backend=self.backend,
            num_trainers=self._trainer.size,
            workers_per_engine=width,
        )
        address: WeightBroadcastAddress = self._trainer.call("open_broadcast", wanted, *self._pieces, rank=0)
        watch = TransferWatch(self._trainer, group, address)
        calls = {rank: group.submit("connect", address.at(1 + rank * width), rank=rank) for rank in range(group.size)}
        watch.finish(self._trainer.submit("join_broadcast", address, self._pieces[0]), calls)
        self._falls_back = False
        return watch
