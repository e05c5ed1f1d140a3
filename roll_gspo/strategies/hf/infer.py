"""Scoring and sampling with plain transformers: the reference for generation engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roll_gspo.batch import Completion, Sequences
from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.base import (
    FinishedRequest,
    GenerationRequest,
    ModelSetup,
    SampleFinished,
    Sampling,
    TokenScores,
    WeightSource,
)
from roll_gspo.strategies.device import local_device, move
from roll_gspo.strategies.head_products import uses_float32
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.decoder import HfDecoder
from roll_gspo.strategies.hf.model import HfWeights, load_model, response_scores
from roll_gspo.strategies.log_probs import score_in_micro_batches
from roll_gspo.strategies.offload import EngineState, Offloadable, Part
from roll_gspo.strategies.residency import Residency
from roll_gspo.strategies.streaming import OutstandingRequests, PromptLimits
from roll_gspo.strategies.transformers_model import compute_logits_in_float32
from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress, WeightBroadcastReceiver
from roll_gspo.strategies.weight_update import check_kind, kind_of


class _Loaded(NamedTuple):
    model: PreTrainedModel
    decoder: HfDecoder
    requests: OutstandingRequests


class HfInfer(Offloadable):
    """`ScoringStrategy`, `StreamingStrategy` and `WeightReceiver` of a checkpoint.

    Weights that were not replaced are copied to the host once. Responses that are not finished continue after the
    engine has left the device; it computes their cached states again.

    Raises:
        ConfigError: the checkpoint cannot be loaded.
    """

    def __init__(self, model: ModelSetup, strategy_config: HfConfig) -> None:
        self._setup = model
        self._batch_size = strategy_config.generate_batch_size
        self._device = local_device()
        loaded = load_model(model.checkpoint, model.dtype, strategy_config.attn_implementation)
        if uses_float32(model.dtype, strategy_config.fp32_lm_head):
            compute_logits_in_float32(loaded, model.dtype)
        decoder = HfDecoder(loaded, self._batch_size)
        limits = PromptLimits(loaded.config.get_text_config().vocab_size)
        self._loaded: _Loaded | None = _Loaded(loaded, decoder, OutstandingRequests(decoder, limits))
        self._weights = Part(self._tensors, "constant")
        self._state = EngineState("hf_infer", self._weights)
        self._receiver: WeightBroadcastReceiver | None = None
        self._failed: int | None = None

    def reside(self, residency: Residency) -> None:
        """Move the weights. Below `FULL`, no cached states of responses are kept."""
        if residency < Residency.FULL:
            self._open().decoder.recompute()
        super().reside(residency)

    def _tensors(self) -> list[Tensor]:
        model = self._open().model
        return [*model.parameters(), *model.buffers()]

    @property
    def weights_version(self) -> int | None:
        """Version of the weights; None until the first update."""
        return self._open().decoder.version

    def _open(self) -> _Loaded:
        if self._loaded is None:
            raise RuntimeError("HfInfer: used after shutdown()")
        return self._loaded

    def _usable(self, work: str, least: Residency = Residency.FULL) -> _Loaded:
        """Return the model if it can do `work`, which needs the residency `least`."""
        loaded = self._open()
        self._state.need(least, work)
        if self._failed is not None:
            raise WeightTransferError(
                f"hf_infer: the transfer of version {self._failed} failed half-way; transfer again"
            )
        return loaded

    @torch.no_grad()
    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample without gradient; float32 on the CPU."""
        model = self._usable("score", Residency.WEIGHTS).model
        return score_in_micro_batches(
            sequences,
            self._setup.micro_batch_size,
            lambda part: response_scores(model, move(part, self._device), self._setup.temperature, entropy),
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
        finished: SampleFinished | None = None,
    ) -> list[list[Completion]]:
        """Sample `num_samples` responses per prompt, `generate_batch_size` rows at a time.

        Only `sampling.stop_token_ids` end a response. Greedy decoding reports log-probabilities at temperature 1.

        Raises:
            DataError: there are no prompts, or one is empty or contains an id outside the vocabulary.
        """
        return self._usable("generate").requests.generate(
            prompts, sampling, seeds, progress, finished, self._batch_size
        )

    @property
    def capacity(self) -> int:
        """`generate_batch_size`."""
        return self._batch_size

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests."""
        self._usable("submit").requests.submit(requests)

    def advance(self, seconds: float) -> list[FinishedRequest]:
        """Decode for about `seconds`. If a step fails or is interrupted, no request remains.

        Raises:
            WeightTransferError: the last weight update failed; the requests remain.
        """
        return self._usable("generate").requests.advance(seconds)

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Remove requests and return what they have sampled."""
        return self._open().requests.abort(keys)

    def partials(self) -> list[FinishedRequest]:
        """Return what every outstanding request has sampled."""
        return self._open().requests.partials()

    @torch.no_grad()
    def update_weights(self, source: WeightSource, version: int) -> None:
        """Copy the values of `source` into this model. After an error it refuses to compute until an update succeeds.

        Raises:
            WeightTransferError: a tensor is unknown, missing, or has another shape, or the source is an adapter's.
        """
        model, decoder, _ = self._open()
        self._state.need(Residency.WEIGHTS, "receive weights")
        check_kind(kind_of(source))
        places = HfWeights(model).views()
        self._failed = version
        self._weights.changed()
        for name, tensor in source:
            place = places.pop(name, None)
            if place is None:
                raise WeightTransferError(f"hf_infer: the model has no weight '{name}', or it was sent twice")
            if place.shape != tensor.shape:
                raise WeightTransferError(
                    f"hf_infer: '{name}' was sent as {tuple(tensor.shape)}, the model has {tuple(place.shape)}"
                )
            place.copy_(tensor)
        if places:
            raise WeightTransferError(f"hf_infer: {len(places)} weights were not sent, e.g. '{min(places)}'")
        self._failed = None
        decoder.version = version
        decoder.recompute()

    def connect(self, address: WeightBroadcastAddress) -> None:
        """Join the weight broadcast of a trainer in another process."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = WeightBroadcastReceiver(address, name="hf_infer")

    def receive(self, version: int) -> None:
        """Receive the weights of `version`."""
        if self._receiver is None:
            raise WeightTransferError("hf_infer: not connected to a trainer; call connect first")
        with self._receiver.receive(version) as weights:
            self.update_weights(weights, version)

    def shutdown(self) -> None:
        """Free the model and leave the broadcast."""
        self._loaded = None
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
