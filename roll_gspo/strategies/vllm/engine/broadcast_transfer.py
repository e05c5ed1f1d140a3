"""Controls the receiving side of a weight transfer from another process.

vLLM imports this module in each of its workers because the engine's `worker_extension_cls` is defined here; the import
registers `ReceivingEngine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from vllm import LLM
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.vllm.engine.loading import shapes_of_full_model
from roll_gspo.strategies.vllm.engine.manifest import differences
from roll_gspo.strategies.vllm.engine.receiving_engine import KEPT, ReceivingEngine
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_commands import CommandReceiver
from roll_gspo.strategies.weight_update import CONNECTING, FULL_MODEL, PROBE, check_kind

RECEIVING = "roll_gspo"

WeightTransferEngineFactory.register_engine(RECEIVING, ReceivingEngine)


class BroadcastWorker:
    """The `worker_extension_cls` of an engine that receives its weights from another process."""

    weight_transfer_engine: ReceivingEngine

    def receive_adapter(self, version: int, number: int) -> int:
        """Receive an adapter; see `ReceivingEngine.receive_adapter`."""
        return self.weight_transfer_engine.receive_adapter(version, number)

    def broadcast_problem(self) -> str:
        """Return the error of the last weight-transfer call; empty if it succeeded."""
        return self.weight_transfer_engine.problem


# Arguments of an engine for `BroadcastTransfer`.
BROADCAST_ARGS: dict[str, object] = {
    "weight_transfer_config": {"backend": RECEIVING},
    "worker_extension_cls": f"{BroadcastWorker.__module__}.{BroadcastWorker.__qualname__}",
}


class BroadcastTransfer:
    """Controls the receiving side of one engine, built with `BROADCAST_ARGS`."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._commands: _Commands | None = None

    def connect(self, address: WeightBroadcastAddress) -> None:
        """Connect all workers of the engine to the sender, with the backend of the address.

        Raises:
            WeightTransferError: a worker cannot reach the sender, or the backend does not work here.
        """
        if self._commands is not None:
            self._commands.close()
            self._commands = None
        if address.backend == "gloo":
            self._llm.init_weight_transfer_engine({"init_info": {"address": asdict(address)}})
            raise_problems(self._llm)
        else:
            self._commands = _Commands(self._llm, address)
            self._commands.serve(CONNECTING)

    def receive(self, version: int) -> None:
        """Receive `version`.

        The KV cache of older weights is dropped. Running requests recompute theirs with the new weights.

        Raises:
            WeightTransferError: the errors of all workers, including the error of the sender.
        """
        if self._commands is not None:
            self._commands.serve(version)
            return
        self._llm.reset_prefix_cache(reset_running_requests=True)
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"version": version}})
        found = problems(self._llm)
        self._llm.finish_weight_update(str(version) if not found else None)
        if found:
            raise WeightTransferError("\n".join(found))


class _Commands:
    """Executes the commands of a sender whose bytes travel between GPUs: the calls of vLLM's protocol."""

    def __init__(self, llm: LLM, address: WeightBroadcastAddress) -> None:
        self._llm = llm
        self._address = address
        self._receiver = CommandReceiver(address, "vllm")
        self._version, self._kind, self._started = CONNECTING, FULL_MODEL, False

    def serve(self, version: int) -> None:
        """Execute all commands of a version."""
        self._version = version
        try:
            self._receiver.serve(version, self._execute)
        finally:
            if self._started:  # the transfer failed; vLLM would refuse to start the next
                self._started = False
                self._llm.finish_weight_update()

    def close(self) -> None:
        """Disconnect from the sender."""
        self._receiver.close()

    def _execute(self, name: str, arguments: dict[str, Any]) -> None:
        methods = {"init": self._init, "start": self._start, "update": self._update, "finish": self._finish}
        methods[name](arguments)
        raise_problems(self._llm)

    def _init(self, arguments: dict[str, Any]) -> None:
        """Start the backend; `arguments` are the init info of vLLM's engine."""
        if "rank_offset" in arguments:
            arguments = {**arguments, "rank_offset": self._address.first_rank}
        self._llm.init_weight_transfer_engine(
            {"init_info": {"address": asdict(self._address), "native": dict(arguments)}}
        )

    def _start(self, arguments: dict[str, Any]) -> None:
        """Check the manifest of an update before any weight changes."""
        self._kind = arguments["kind"]
        if self._kind != PROBE:
            check_kind(self._kind)
            self._check_manifest(arguments)
            self._llm.reset_prefix_cache(reset_running_requests=True)
        self._llm.start_weight_update()
        self._started = True

    def _check_manifest(self, arguments: Mapping[str, Any]) -> None:
        dtypes = [getattr(torch, name) for name in arguments["dtype_names"]]
        announced = zip(arguments["names"], map(tuple, arguments["shapes"]), dtypes, strict=True)
        if wrong := differences(shapes_of_full_model(self._llm.model_config), list(announced)):
            raise WeightTransferError("weight transfer: " + "; ".join(wrong) + KEPT)

    def _update(self, arguments: dict[str, Any]) -> None:
        """Receive all tensors, or a part of them; `arguments` are the update info of vLLM's engine."""
        self._llm.update_weights(
            {"update_info": {"version": self._version, "kind": self._kind, "native": dict(arguments)}}
        )

    def _finish(self, arguments: dict[str, Any]) -> None:
        """Complete an update."""
        self._started = False
        self._llm.finish_weight_update(None if self._kind == PROBE else str(self._version))


def problems(llm: LLM) -> list[str]:
    """Return the errors of all workers without duplicates."""
    return list(dict.fromkeys(problem for problem in llm.collective_rpc("broadcast_problem") if problem))


def raise_problems(llm: LLM) -> None:
    """Raise the errors of the workers' last weight-transfer call.

    Raises:
        WeightTransferError: the errors of all workers.
    """
    if found := problems(llm):
        raise WeightTransferError("\n".join(found))
