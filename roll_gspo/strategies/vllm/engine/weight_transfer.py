"""Weight transfer inside one process: vLLM loads the trainer's live tensors.

`InProcessTransfer` drives vLLM's weight-transfer protocol: init once, then start, update and finish per version. vLLM
passes the tensors by reference to `InProcessEngine`, the backend `in_process`, which runs in the engine's worker.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from vllm import LLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.base import WeightSource
from roll_gspo.strategies.vllm.engine.loading import ModelLoader, shapes_of_full_model
from roll_gspo.strategies.vllm.engine.manifest import differences
from roll_gspo.strategies.weight_update import FULL_MODEL, check_kind, kind_of

IN_PROCESS = "in_process"


@dataclass
class InProcessInitInfo(WeightTransferInitInfo):
    """Empty: a transfer inside one process needs no address."""


@dataclass
class InProcessUpdateInfo(WeightTransferUpdateInfo):
    """The whole model: (Hugging Face name, tensor) pairs, by reference."""

    weights: list[tuple[str, Tensor]]


class InProcessEngine(WeightTransferEngine[InProcessInitInfo, InProcessUpdateInfo]):
    """Worker side: refuse a wrong manifest before any weight changes, else load the model layer by layer."""

    init_info_cls = InProcessInitInfo
    update_info_cls = InProcessUpdateInfo

    def init_transfer_engine(self, init_info: InProcessInitInfo) -> None:
        """Read from the checkpoint which tensors a full model has."""
        self._expected = shapes_of_full_model(self.model_config)
        self._loader = ModelLoader(self.model, self.model_config)

    def start_weight_update(self) -> None:
        """Do nothing: the old weights stay usable until the manifest is accepted."""

    def receive_weights(self, update_info: InProcessUpdateInfo) -> None:
        """Check and load the whole model."""
        wrong = differences(self._expected, [(name, tuple(t.shape), t.dtype) for name, t in update_info.weights])
        if wrong:
            raise WeightTransferError("weight transfer: " + "; ".join(wrong) + "; the old weights were kept")
        self._loader.replace(update_info.weights)

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` loaded the whole model."""

    def shutdown(self) -> None:
        """Do nothing: no tensor is kept between updates."""


WeightTransferEngineFactory.register_engine(IN_PROCESS, InProcessEngine)


class InProcessTransfer:
    """Transfer weights, version by version, to an engine that was built with the backend `in_process`."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._initialised = False

    def send(self, source: WeightSource, version: int) -> None:
        """Replace the engine's weights by those of `source`.

        The KV cache of older weights is dropped. Running requests recompute theirs with the new weights.

        Raises:
            WeightTransferError: `source` is an adapter, the weights differ from the manifest, or the source or the
                engine failed.
        """
        check_kind(kind_of(source), FULL_MODEL)
        try:
            weights = [(name, tensor.detach()) for name, tensor in source]
            self._llm.reset_prefix_cache(reset_running_requests=True)
            if not self._initialised:
                self._llm.init_weight_transfer_engine({"init_info": {}})
                self._initialised = True
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": {"weights": weights}})
            self._llm.finish_weight_update(str(version))
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
