"""Waits for the calls of a weight transfer. If it fails, workers that do not return are killed.

A call of NCCL has no time limit, so a worker that waits for a lost or late one would wait for ever. The members of a
transfer find out in time who is late (`strategies/weight_rendezvous.py`), but cannot always return.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

from roll_gspo.errors import WeightTransferError, WorkerHungError
from roll_gspo.execution.base import Pending, WorkerGroup, most_telling, wait_first
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_rendezvous import TransferObserver

logger = logging.getLogger(__name__)
_POLL_S = 1.0
GRACE_S = 15.0


class TransferWatch:
    """Watches the transfers of one connection.

    Args:
        trainer: ranks of the trainer; if one does not return, all are killed.
        engines: engines that receive; those that do not return are killed and can be restarted.
        address: address of the connection.
        grace_s: time that workers have to return after an error. The trainer has in addition the time limit of the
            connection, as it may be waiting for another member.
    """

    def __init__(
        self, trainer: WorkerGroup, engines: WorkerGroup, address: WeightBroadcastAddress, grace_s: float = GRACE_S
    ) -> None:
        self._trainer = trainer
        self._engines = engines
        self._address = address
        self._grace_s = grace_s
        self._observer = TransferObserver(address)

    def finish(self, trainer_call: Pending, engine_calls: Mapping[int, Pending]) -> None:
        """Wait for the trainer's call and those of the engines, by rank.

        Raises:
            RollGspoError: the most telling error of a call. No call is running then.
        """
        errors: list[Exception] = []
        failed_at = math.inf
        engines = {pending: rank for rank, pending in engine_calls.items()}
        waiting = [trainer_call, *engines]
        while waiting:
            for pending in wait_first(waiting, _POLL_S):
                waiting.remove(pending)
                try:
                    pending.result()
                except Exception as error:
                    errors.append(error)
            if waiting and not errors and (text := self._observer.failure()):
                errors.append(WeightTransferError(text))
            if errors and failed_at == math.inf:
                failed_at = time.monotonic()
                self._observer.report_loss(str(most_telling(errors)))
            elapsed = time.monotonic() - failed_at
            if elapsed > self._grace_s:
                self._kill_engines([engines[pending] for pending in waiting if pending in engines], errors)
                waiting = [pending for pending in waiting if pending not in engines]
            if waiting and elapsed > self._grace_s + self._address.timeout_s:
                self._kill_trainer(errors)
        if errors:
            raise most_telling(errors)

    def _kill_engines(self, ranks: list[int], errors: list[Exception]) -> None:
        for rank in ranks:
            why = f"killed {self._grace_s:g} s after a weight transfer had failed: {most_telling(errors)}"
            logger.warning("%s: rank %d: %s", self._engines.name, rank, why)
            self._engines.lose(rank, why)

    def _kill_trainer(self, errors: list[Exception]) -> None:
        self._trainer.kill()
        seconds = self._grace_s + self._address.timeout_s
        raise WorkerHungError(
            f"{self._trainer.name}: killed {seconds:g} s after a weight transfer had failed: {most_telling(errors)}"
        )
