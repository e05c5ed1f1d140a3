"""Scoring and sampling with plain transformers: the reference for generation engines.

Legend: B rows that are decoded together, P prompt positions (left-padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from roll_gspo.batch import Completion, Sequences
from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.base import ModelSetup, SampleFinished, Sampling, TokenScores, WeightSource
from roll_gspo.strategies.device import local_device, move
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.model import HfWeights, load_model, response_scores
from roll_gspo.strategies.hf.sampling import draw, sampling_log_probs, uniforms
from roll_gspo.strategies.log_probs import score_in_micro_batches
from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress, WeightBroadcastReceiver


@dataclass
class _Row:
    """A sample that is being decoded."""

    number: int
    prompt: Sequence[int]
    seed: int
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def completion(self) -> Completion:
        return Completion(tuple(self.token_ids), tuple(self.log_probs), self.finish_reason)


class HfInfer:
    """`ScoringStrategy`, `GenerateStrategy` and `WeightReceiver` of a checkpoint.

    Raises:
        ConfigError: the checkpoint cannot be loaded.
    """

    def __init__(self, model: ModelSetup, strategy_config: HfConfig) -> None:
        self._setup = model
        self._batch_size = strategy_config.generate_batch_size
        self._device = local_device()
        self._loaded: PreTrainedModel | None = load_model(
            model.checkpoint, model.dtype, strategy_config.attn_implementation
        )
        self._receiver: WeightBroadcastReceiver | None = None
        self._failed: int | None = None
        self.weights_version = 0

    @property
    def _model(self) -> PreTrainedModel:
        if self._loaded is None:
            raise RuntimeError("HfInfer: used after shutdown()")
        if self._failed is not None:
            raise WeightTransferError(
                f"hf_infer: the transfer of version {self._failed} failed half-way; transfer again"
            )
        return self._loaded

    @torch.no_grad()
    def score(self, sequences: Sequences, entropy: bool = False) -> TokenScores:
        """Score every sample without gradient; float32 on the CPU."""
        return score_in_micro_batches(
            sequences,
            self._setup.micro_batch_size,
            lambda part: response_scores(self._model, move(part, self._device), self._setup.temperature, entropy),
        )

    @torch.no_grad()
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
        """
        if not all(prompts):
            raise ValueError("generate: a prompt is empty; give it at least one token")
        rows = [
            _Row(number * sampling.num_samples + sample, prompt, seed + sample)
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            for sample in range(sampling.num_samples)
        ]
        done, samples = 0, sampling.num_samples
        for start in range(0, len(rows), self._batch_size):
            for newly in self._decode(rows[start : start + self._batch_size], sampling):
                done += len(newly)
                if progress is not None and newly:
                    progress(done, len(rows))
                for row in newly:
                    if finished is not None:
                        finished(*divmod(row.number, samples), row.completion())
        return [[row.completion() for row in rows[start : start + samples]] for start in range(0, len(rows), samples)]

    def _decode(self, rows: list[_Row], sampling: Sampling) -> Iterator[list[_Row]]:
        """Decode rows together and refill the batch from the queue. After each token, yield the rows that ended."""
        stop = set(sampling.stop_token_ids)
        input_ids, attention_mask = _left_pad([row.prompt for row in rows], self._device)
        noise = uniforms([row.seed for row in rows], sampling.max_new_tokens)
        cache = DynamicCache(config=self._model.config)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        for step in range(sampling.max_new_tokens):
            logits = self._model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            log_probs = sampling_log_probs(logits, sampling)
            tokens = draw(log_probs, noise[:, step], greedy=sampling.temperature == 0)
            chosen = log_probs.gather(1, tokens[:, None])[:, 0]
            last = step + 1 == sampling.max_new_tokens
            _append(rows, tokens.tolist(), chosen.tolist(), stop, last)
            alive = [i for i, row in enumerate(rows) if not row.finish_reason]
            yield [row for row in rows if row.finish_reason]
            if not alive:
                return
            if len(alive) < len(rows):
                # ended rows leave the batch and its cache
                rows, kept = [rows[i] for i in alive], torch.tensor(alive)
                noise = noise[kept]
                kept = kept.to(self._device)
                cache.batch_select_indices(kept)
                tokens, attention_mask, position_ids = tokens[kept], attention_mask[kept], position_ids[kept]
            input_ids = tokens[:, None]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], -1)
            position_ids = position_ids[:, -1:] + 1

    @torch.no_grad()
    def update_weights(self, source: WeightSource, version: int) -> None:
        """Copy the values of `source` into this model. After an error it refuses to compute until an update succeeds.

        Raises:
            WeightTransferError: a tensor is unknown, missing, or has another shape.
        """
        self._failed = None
        places = dict(HfWeights(self._model))
        self._failed = version
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
        self.weights_version = version
        self._failed = None

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


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return [B, P] token ids and attention mask; prompts end in the last column."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _append(rows: list[_Row], tokens: list[int], log_probs: list[float], stop: set[int], last: bool) -> None:
    """Append each row's token and set the finish reason of rows that end with it."""
    for row, token, log_prob in zip(rows, tokens, log_probs, strict=True):
        row.token_ids.append(token)
        row.log_probs.append(log_prob)
        if token in stop:
            row.finish_reason = "stop"
        elif last:
            row.finish_reason = "length"
