"""From a trainer's live weights to a vLLM engine, by vLLM's own weight-transfer protocol.

`WeightTransfer` is the one driver for every backend: `trainer_init` once, then `send_weights` a version, which
goes init / start / update / finish through `EngineClient`. The backend defined here, `in_process`, hands tensors
over by reference; vLLM's own `ipc` and `nccl` take the same driver with their own init info.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from vllm import LLM
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.base import WeightSource as VllmWeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.base import WeightSource
from roll_gspo.strategies.vllm.engine.loading import load_full_model, shapes_of_full_model
from roll_gspo.strategies.vllm.engine.manifest import differences

IN_PROCESS = "in_process"


@dataclass
class InProcessInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: both ends are in one process."""


@dataclass
class InProcessUpdateInfo(WeightTransferUpdateInfo):
    """The whole model in one piece: (Hugging Face name, tensor) pairs, by reference."""

    weights: list[tuple[str, Tensor]]


class InProcessEngine(WeightTransferEngine[InProcessInitInfo, InProcessUpdateInfo]):
    """Worker side: refuse a wrong manifest before anything changes, else load the model layer by layer."""

    init_info_cls = InProcessInitInfo
    update_info_cls = InProcessUpdateInfo

    def init_transfer_engine(self, init_info: InProcessInitInfo) -> None:
        """Learn from the checkpoint what a full model consists of."""
        self._expected = shapes_of_full_model(self.model_config)
        self._half_loaded = False

    def start_weight_update(self) -> None:
        """Nothing yet: the old weights stay usable until the manifest is accepted."""

    def receive_weights(self, update_info: InProcessUpdateInfo) -> None:
        """Check and load the whole model."""
        wrong = differences(self._expected, [(name, tuple(t.shape), t.dtype) for name, t in update_info.weights])
        if wrong:
            raise WeightTransferError("weight transfer: " + "; ".join(wrong) + "; the old weights were kept")
        if self._half_loaded:
            raise WeightTransferError("weight transfer: an earlier one broke off half-way; build a new engine")
        self._half_loaded = True
        load_full_model(self.model, self.model_config, update_info.weights)
        self._half_loaded = False

    def finish_weight_update(self) -> None:
        """Nothing left: `receive_weights` saw the whole model."""

    def shutdown(self) -> None:
        """Nothing is held between updates."""


@dataclass
class InProcessTrainerInitInfo(TrainerInitInfo):
    """Trainer side of `in_process`."""

    backend: ClassVar[str] = IN_PROCESS


class InProcessTrainerEngine(TrainerWeightTransferEngine[InProcessTrainerInitInfo]):
    """Trainer side: every rank iterates the source (an export may be a collective), rank 0 hands it over."""

    init_info_cls = InProcessTrainerInitInfo

    @classmethod
    def trainer_init(
        cls,
        init_info: InProcessTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: VllmWeightSource | None = None,
    ) -> InProcessTrainerEngine:
        """Connect to the engine behind `client`."""
        if source is None:
            raise ValueError("in_process weight transfer needs a source")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            client.init_weight_transfer_engine({})
        return engine

    def send_weights(self) -> None:
        """Hand over the source's current tensors; they are views wherever the trainer's layout allows."""
        assert self.source is not None
        weights = list(self.source)
        if self.is_sender:
            self.client.start_weight_update()
            self.client.update_weights({"weights": weights})
            self.client.finish_weight_update()


WeightTransferEngineFactory.register_engine(IN_PROCESS, InProcessEngine)
WeightTransferTrainerFactory.register_engine(IN_PROCESS, InProcessTrainerEngine)


class PolicyWeights(VllmWeightSource):
    """The trainer's `WeightSource` as vLLM wants it; the trainer may hand out a new one for each version."""

    def __init__(self) -> None:
        self._source: WeightSource | None = None
        self._metadata: list[ParamMeta] | None = None

    def rebind(self, source: WeightSource) -> None:
        """Iterate `source` from now on."""
        if source is not self._source:
            self._source, self._metadata = source, None

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes in order; the first call costs one pass over the source."""
        if self._metadata is None:
            self._metadata = [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if self._source is None:
            raise ValueError("no weight source was given")
        for name, tensor in self._source:
            yield name, tensor.detach()


class EngineClient:
    """The four calls of vLLM's protocol on an `LLM` of this process (`VLLMWeightSyncClient`)."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Once, before the first update."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Open an update."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """One piece of the weights."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update under its version; keys and values of older weights are forgotten."""
        if not self._llm.reset_prefix_cache():
            raise WeightTransferError("weight transfer: requests are running; finish or abort them first")
        self._llm.finish_weight_update(weight_version or str(self.version))


class WeightTransfer:
    """Sends a policy's weights to one engine, version by version."""

    def __init__(self, llm: LLM, init_info: TrainerInitInfo) -> None:
        self._llm = llm
        self._init_info = init_info
        self._client = EngineClient(llm)
        self._source = PolicyWeights()
        self._trainer: TrainerWeightTransferEngine | None = None

    def send(self, source: WeightSource, version: int) -> None:
        """Replace the engine's weights by those of `source`.

        Raises:
            WeightTransferError: what differs from the manifest, or the engine's own error.
        """
        self._source.rebind(source)
        self._client.version = version
        try:
            if self._trainer is None:
                self._trainer = WeightTransferTrainerFactory.trainer_init(
                    self._init_info, client=self._client, source=self._source
                )
            self._trainer.send_weights()
        except WeightTransferError:
            raise
        except Exception as error:
            raise WeightTransferError(
                f"weight transfer of version {version}: {type(error).__name__}: {error}"
            ) from error
        if self._llm.get_weight_version() != str(version):
            raise WeightTransferError(
                f"weight transfer of version {version}: the engine is at '{self._llm.get_weight_version()}'"
            )
