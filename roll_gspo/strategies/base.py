"""Protocols of the engines: train a policy, score tokens, generate responses. Roles use only these.

Legend: B samples, T response positions (see `roll_gspo.batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from roll_gspo.batch import Completion, Sequences, TrainBatch
from roll_gspo.metrics import Metric
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress


@dataclass(frozen=True)
class ModelSetup:
    """The model of an engine and its scoring settings.

    Attributes:
        checkpoint: folder in Hugging Face layout (config.json, safetensors, tokenizer).
        dtype: dtype of parameters and activations.
        micro_batch_size: samples per forward pass of scoring.
        temperature: log-probs are those of `softmax(logits / temperature)`.
        seed: seed of every random choice of the engine.
        max_tokens: tokens per forward pass, instead of `micro_batch_size`; None counts samples.
        replay_routing: the routers of a mixture of experts choose `TrainBatch.routed_experts` in every update.
        record_routing: scores contain the experts that the routers choose. Updates report `routing/update_shift`, the
            distance of the routers from `TrainBatch.routed_experts`. `replay_routing` includes this.
        lora: the adapter that is trained; None to train all weights.
    """

    checkpoint: Path
    dtype: torch.dtype
    micro_batch_size: int
    temperature: float
    seed: int
    max_tokens: int | None = None
    replay_routing: bool = False
    record_routing: bool = False
    lora: LoraSetup | None = None


@dataclass(frozen=True)
class GenerationSetup:
    """Settings of a generation engine besides the model.

    Attributes:
        max_sequence_length: longest prompt plus response, in tokens.
        loads_checkpoint: the engine generates with the weights of the checkpoint; no trainer replaces them.
        receives_broadcast: the trainer is in another process, so that the engine is a `WeightReceiver`.
        record_routed_experts: completions hold the experts that a mixture of experts chose.
        shares_devices: the engine is an `OffloadableEngine` and leaves its devices while other engines use them.
        lora: the engine loads the weights of the checkpoint and receives adapters of this kind alone, never all
            weights; None if it receives all weights.
        adapter_versions: versions of the adapter that may have requests at the same time. If there are more, requests
            of the oldest version continue with the newest one.
    """

    max_sequence_length: int
    loads_checkpoint: bool = False
    receives_broadcast: bool = False
    record_routed_experts: bool = False
    shares_devices: bool = False
    lora: LoraSetup | None = None
    adapter_versions: int = 1


@dataclass(frozen=True)
class OptimizerSetup:
    """AdamW and its learning-rate schedule; `total_steps` counts optimizer steps of the whole run."""

    learning_rate: float
    total_steps: int
    max_grad_norm: float
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    min_learning_rate: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


class TokenScores(NamedTuple):
    """Log-prob of each response token and entropy of its distribution, both [B, T] float32.

    Masked positions are 0. `entropy` is None unless requested. `routed_experts` [B, S, L, K] int16 are the experts that
    the routers chose, -1 on padding; None unless recorded.
    """

    log_probs: Tensor
    entropy: Tensor | None
    routed_experts: Tensor | None = None


# (log_probs [b, t], entropy [b, t] or None, the micro-batch) -> (loss, metrics). The loss is this
# micro-batch's share of the mini-batch loss: shares are summed, never averaged, by every engine.
LossFunction = Callable[[TokenScores, TrainBatch], tuple[Tensor, dict[str, Metric]]]


@dataclass(frozen=True)
class UpdateResult:
    """Result of one optimizer step.

    Attributes:
        loss: loss of the whole mini-batch.
        grad_norm: gradient norm before clipping.
        learning_rate: learning rate of the step.
        applied: False if loss or gradient were not finite, so that no parameter changed.
        metrics: metrics of the loss function, merged over the micro-batches.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class WeightSource(Protocol):
    """The policy's weights under their Hugging Face names. Each iteration gives the current values.

    A tied output head is omitted. Tensors may be views of memory that the next tensor overwrites; clone them to keep
    them. If several ranks share the model, all of them must iterate to the end.

    A source of a LoRA adapter alone has the attribute `kind`, which is `ADAPTER` (see `weight_update`), and yields the
    adapter's tensors under the names of PEFT.
    """

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class ScoringStrategy(Protocol):
    """A frozen or trained model that scores given tokens."""

    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample without gradient, in micro-batches. The result is on the CPU."""
        ...


class Checkpointable(Protocol):
    """An engine with a training state that can be saved and loaded."""

    def save(self, folder: Path, asynchronous: bool = False) -> None:
        """Write parameters (and a value head), optimizer, schedule and RNG state into an empty folder.

        If `asynchronous`, the state is copied to host memory and written while training continues; `finish_save`
        completes it.

        Raises:
            CheckpointError: the state, or that of an earlier asynchronous save, cannot be written.
        """
        ...

    def finish_save(self, wait: bool = True) -> bool:
        """Return whether the last `save` is complete; with `wait`, wait until it is. True if nothing was saved.

        Raises:
            CheckpointError: the state cannot be written.
        """
        ...

    def load(self, folder: Path) -> None:
        """Load a state that `save` wrote."""
        ...


# (values [b, t], the micro-batch) -> (this micro-batch's share of the loss, metrics)
ValueLossFunction = Callable[[Tensor, TrainBatch], tuple[Tensor, dict[str, Metric]]]


class ValueStrategy(Checkpointable, Protocol):
    """A model with a value head and an optimizer: the critic's engine."""

    def values(self, sequences: Sequences) -> Tensor:
        """Return [B, T] float32 on the CPU, without gradient: expected return before each token; 0 where masked."""
        ...

    def update(self, micro_batches: Sequence[TrainBatch], loss: ValueLossFunction) -> UpdateResult:
        """Run forward and backward over all micro-batches, then one optimizer step (skipped if not finite)."""
        ...


class TrainedModel(ScoringStrategy, Protocol):
    """A model with trained weights, which can be exported."""

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout (config, safetensors, tokenizer)."""
        ...


class TrainStrategy(TrainedModel, Checkpointable, Protocol):
    """A model with an optimizer."""

    def update(self, micro_batches: Sequence[TrainBatch], loss: LossFunction, entropy: bool) -> UpdateResult:
        """Run forward and backward over all micro-batches, then one optimizer step (skipped if not finite)."""
        ...

    def weights(self) -> WeightSource:
        """Return the live weights, for the generation engine."""
        ...


@runtime_checkable
class AdapterStrategy(TrainStrategy, Protocol):
    """A trainer that scores without its adapter, too, so that the frozen model is the reference."""

    def score_base(self, sequences: Sequences) -> TokenScores:
        """Score every sample with the frozen model, without gradient and entropy. The result is on the CPU."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in the layout of `peft` into an existing folder."""
        ...


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of responses.

    Attributes:
        num_samples: samples per prompt.
        max_new_tokens: maximum length of a response.
        temperature: sampling temperature; 0 is greedy.
        top_p, top_k: truncation of the distribution; 1.0 and 0 (or -1) keep all of it.
        stop_token_ids: generation ends after one of these tokens, which the response keeps.
    """

    num_samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()


# Called with (number of the prompt, number of its sample, completion).
SampleFinished = Callable[[int, int, Completion], None]


class GenerateStrategy(Protocol):
    """A generation engine with replaceable weights."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
        finished: SampleFinished | None = None,
    ) -> list[list[Completion]]:
        """Sample `num_samples` responses per prompt. Sample j of prompt i uses the seed `seeds[i] + j`.

        Log-probs are those of the sampled distribution (temperature, top-p and top-k applied). `progress` is called
        with (finished samples, all samples). `finished` is called once per sample, in any order and as early as
        possible, while other samples continue. An exception in it ends the generation.
        """
        ...

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Load the weights of `source`. Nothing computed with older weights is used afterwards.

        Raises:
            WeightTransferError: the engine failed, or the weights differ from the manifest.
        """
        ...

    def shutdown(self) -> None:
        """Free the engine, which cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """A response to sample.

    Attributes:
        key: number of the request from 0, unique among the outstanding requests of an engine.
        prompt: the prompt's tokens.
        sampling: sampling parameters; `num_samples` is ignored.
        seed: seed of the response.
        partial: tokens of the response that are known already; sampling continues after them. The random numbers of
            the rest depend on the seed and on the number of known tokens.
    """

    key: int
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    partial: Completion | None = None


class FinishedRequest(NamedTuple):
    """The response of a request, including the tokens of `GenerationRequest.partial`."""

    key: int
    completion: Completion


@runtime_checkable
class StreamingStrategy(GenerateStrategy, Protocol):
    """A generation engine that admits requests while others decode.

    Weights may be replaced (`update_weights`, `receive`) while requests are outstanding. They continue with the new
    weights, and `Completion.version_runs` records which version sampled which tokens.
    """

    @property
    def capacity(self) -> int:
        """Number of requests that decode at the same time; further ones wait in the engine."""
        ...

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests and return at once.

        Raises:
            DataError: a prompt is empty, too long, or contains an id outside the vocabulary; nothing was queued.
            WeightTransferError: the engine has no complete weights.
        """
        ...

    def advance(self, seconds: float) -> list[FinishedRequest]:
        """Decode for about `seconds`, at least one token, and return the requests that ended.

        Returns early if no request is outstanding.
        """
        ...

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Remove requests and return what they have sampled; unknown keys are ignored."""
        ...

    def partials(self) -> list[FinishedRequest]:
        """Return what every outstanding request has sampled; the requests continue."""
        ...


class NativeWeightSender(Protocol):
    """One rank of the trainer in a weight transfer between GPUs. Every rank has one and makes the same calls."""

    def start(self, source: WeightSource) -> None:
        """Start the backend while every engine connects. `source` is exported once, to learn what it contains.

        Raises:
            WeightTransferError: the backend does not work here, or an engine failed or is late.
        """
        ...

    def send(self, source: WeightSource, version: int) -> None:
        """Send the weights; return when every engine has loaded all of them.

        Raises:
            WeightTransferError: the source failed, or an engine failed, is late or waits for another version.
        """
        ...

    def close(self) -> None:
        """Disconnect. Further calls do nothing."""
        ...


class WeightReceiver(Protocol):
    """An engine that receives its weights from a trainer in another process."""

    def connect(self, address: WeightBroadcastAddress) -> None:
        """Join the transfer of an open sender (first time, or again for a new sender), with the address's backend.

        Call it on all engines at the same time, and `NativeSender.start` on all ranks of the trainer unless the backend
        is gloo.

        Raises:
            WeightTransferError: the sender is not reached within `address.timeout_s`, or the backend does not work
                here.
        """
        ...

    def receive(self, version: int) -> None:
        """Receive the weights that the sender sends as `version`. Call `send` and this at the same time.

        Nothing computed with older weights is used afterwards. After an error the engine refuses to generate until a
        transfer succeeds.

        Raises:
            WeightTransferError: the sender or another receiver failed or is late, or the weights belong to another
                model.
        """
        ...
