"""Transfer of adapters to a vLLM engine, inside one process or from another one.

It does not use vLLM's weight-transfer protocol, because that removes all adapters at the end of an update (vLLM 0.32).
"""

from __future__ import annotations

from dataclasses import asdict

from torch import nn
from vllm import LLM

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.base import WeightSource
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.vllm.engine.adapters import AdapterLoader, AdapterSlots
from roll_gspo.strategies.vllm.engine.broadcast_transfer import raise_problems
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_update import ADAPTER, check_kind, kind_of


class InProcessAdapters:
    """Transfers adapters to an engine in this process.

    Args:
        llm: the engine.
        lora: the adapter.
        slots: the engine's adapters.
    """

    def __init__(self, llm: LLM, lora: LoraSetup, slots: AdapterSlots) -> None:
        def loader(model: nn.Module) -> AdapterLoader:
            return AdapterLoader(model, llm.model_config, lora)

        self._slots = slots
        (self._loader,) = llm.apply_model(loader)

    def send(self, source: WeightSource, version: int) -> None:
        """Add the adapter of `source`. Running requests keep theirs.

        Raises:
            WeightTransferError: `source` is no adapter, or its tensors differ from the manifest.
        """
        check_kind(kind_of(source), ADAPTER)
        try:
            tensors = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in source]
            number = self._loader.load(version, self._slots.next_number(), tensors)
        except WeightTransferError:
            raise
        except Exception as error:
            raise WeightTransferError(
                f"weight transfer of version {version}: {type(error).__name__}: {error}"
            ) from error
        self._slots.adopt(version, number)


class BroadcastAdapters:
    """Receives adapters from another process, always through host memory. The engine is built with `BROADCAST_ARGS`.

    Args:
        llm: the engine.
        lora: the adapter.
        slots: the engine's adapters.
    """

    def __init__(self, llm: LLM, lora: LoraSetup, slots: AdapterSlots) -> None:
        self._llm = llm
        self._lora = lora
        self._slots = slots

    def connect(self, address: WeightBroadcastAddress) -> None:
        """Connect all workers of the engine to the sender.

        Raises:
            WeightTransferError: a worker cannot reach the sender, or the backend is not gloo.
        """
        if address.backend != "gloo":
            raise WeightTransferError(
                f"weight transfer: adapters travel through host memory, not with {address.backend}; set gloo"
            )
        self._llm.init_weight_transfer_engine({"init_info": {"address": asdict(address), "lora": asdict(self._lora)}})
        raise_problems(self._llm)

    def receive(self, version: int) -> None:
        """Receive the adapter of `version`. Running requests keep theirs.

        Raises:
            WeightTransferError: the errors of all workers, including the error of the sender.
        """
        number = self._slots.next_number()
        numbers = self._llm.collective_rpc("receive_adapter", args=(version, number))
        try:
            raise_problems(self._llm)
        except WeightTransferError:
            self._slots.discard(number)
            raise
        self._slots.adopt(version, numbers[0])
