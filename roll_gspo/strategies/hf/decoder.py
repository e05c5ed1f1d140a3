"""Continuous batching with plain transformers: rows join and leave the batch between tokens.

Legend: B rows that are decoded together, P positions of prompts and known tokens (left-padded), S cached positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from roll_gspo.strategies.base import Sampling
from roll_gspo.strategies.hf.sampling import draw, sampling_log_probs, uniforms
from roll_gspo.strategies.streaming import Response


class _Row(NamedTuple):
    """A running response and the uniform numbers of its tokens after the known ones."""

    response: Response
    noise: np.ndarray

    def next_uniform(self) -> float:
        return float(self.noise[self.response.num_sampled])


class _Batch:
    """Rows that are decoded together with the same distribution settings.

    The cache is empty until the first step, which computes all positions of the rows.
    """

    def __init__(self, rows: list[_Row], model: PreTrainedModel) -> None:
        self.rows = rows
        self.sampling = rows[0].response.sampling
        contexts = [[*row.response.prompt, *row.response.token_ids] for row in rows]
        self._input_ids, self._attention_mask = _left_pad(contexts, model.device)
        self._position_ids = (self._attention_mask.cumsum(-1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=model.config)

    def step(self, model: PreTrainedModel, version: int | None) -> list[Response]:
        """Sample one token per row. Rows that end leave the batch and are returned."""
        logits = model(
            input_ids=self._input_ids,
            attention_mask=self._attention_mask,
            position_ids=self._position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        log_probs = sampling_log_probs(logits, self.sampling)
        noise = torch.tensor([row.next_uniform() for row in self.rows], dtype=torch.float64)
        tokens = draw(log_probs, noise, greedy=self.sampling.temperature == 0)
        chosen = log_probs.gather(1, tokens[:, None])[:, 0]
        for row, token, log_prob in zip(self.rows, tokens.tolist(), chosen.tolist(), strict=True):
            _append(row.response, token, log_prob, version)
        self._input_ids = tokens[:, None]
        self._attention_mask = torch.cat([self._attention_mask, self._attention_mask.new_ones(len(self.rows), 1)], -1)
        self._position_ids = self._position_ids[:, -1:] + 1
        ended = [row.response for row in self.rows if row.response.finish_reason]
        self.keep(lambda response: not response.finish_reason)
        return ended

    def keep(self, wanted: Callable[[Response], bool]) -> None:
        """Keep the rows of wanted responses; remove all others from the batch and its cache."""
        alive = [index for index, row in enumerate(self.rows) if wanted(row.response)]
        if len(alive) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in alive]
        if not self.rows:
            return
        kept = torch.tensor(alive, device=self._input_ids.device)
        self._cache.batch_select_indices(kept)
        self._input_ids, self._attention_mask = self._input_ids[kept], self._attention_mask[kept]
        self._position_ids = self._position_ids[kept]

    def can_absorb(self, other: _Batch) -> bool:
        """Return whether both batches sample in the same way and hold plain caches, which can be padded."""
        layers = [*self._cache.layers, *other._cache.layers]
        return _distribution(self.sampling) == _distribution(other.sampling) and all(
            type(layer) is DynamicLayer for layer in layers
        )

    def absorb(self, other: _Batch) -> None:
        """Append the rows of another batch. Both have made a step."""
        parts = (self, other)
        width = max(int(part._attention_mask.sum(-1).max()) for part in parts)
        shifts = [width - part._attention_mask.shape[1] for part in parts]  # below 0: drop columns of padding
        for own, joining in zip(self._cache.layers, other._cache.layers, strict=True):
            assert isinstance(own, DynamicLayer) and isinstance(joining, DynamicLayer)
            own.keys = _padded_rows(own.keys, joining.keys, shifts)
            own.values = _padded_rows(own.values, joining.values, shifts)
        self._attention_mask = torch.cat([pad(p._attention_mask, (s, 0)) for p, s in zip(parts, shifts, strict=True)])
        self._input_ids = torch.cat([part._input_ids for part in parts])
        self._position_ids = torch.cat([part._position_ids for part in parts])
        self.rows = [*self.rows, *other.rows]


class HfDecoder:
    """Samples responses with a transformers model, at most `batch_size` at the same time.

    Responses that are started while others run form a batch, whose first step computes their prompts. Then it is
    merged into the running batch of the same distribution settings. Batches of models with other caches than plain
    ones (e.g. sliding windows) stay separate.

    Args:
        model: the model.
        batch_size: rows of all batches.

    Attributes:
        version: version of the model's weights; None until the first update.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._waiting: deque[Response] = deque()
        self._batches: list[_Batch] = []
        self.version: int | None = None

    def add(self, responses: Sequence[Response]) -> None:
        """Queue responses. Rows that end make room for them."""
        self._waiting.extend(responses)

    @torch.no_grad()
    def step(self) -> list[Response]:
        """Sample one token per running response."""
        self._admit()
        ended = [response for batch in self._batches for response in batch.step(self._model, self.version)]
        batches: list[_Batch] = []
        for batch in self._batches:
            if not batch.rows:
                continue
            host = next((other for other in batches if other.can_absorb(batch)), None)
            if host is None:
                batches.append(batch)
            else:
                host.absorb(batch)
        self._batches = batches
        return ended

    def _admit(self) -> None:
        free = self._batch_size - sum(len(batch.rows) for batch in self._batches)
        while self._waiting and free:
            distribution = _distribution(self._waiting[0].sampling)
            rows: list[_Row] = []
            while self._waiting and free and _distribution(self._waiting[0].sampling) == distribution:
                response = self._waiting.popleft()
                noise = uniforms([response.seed], response.limit - response.num_known)[0]
                rows.append(_Row(response, noise.numpy()))
                free -= 1
            self._batches.append(_Batch(rows, self._model))

    def read(self, responses: Iterable[Response]) -> None:
        """Do nothing: every token is appended when it is sampled."""

    def remove(self, responses: Iterable[Response]) -> None:
        """Remove rows and waiting responses."""
        removed = {response.key for response in responses}
        self._waiting = deque(response for response in self._waiting if response.key not in removed)
        for batch in self._batches:
            batch.keep(lambda response: response.key not in removed)
        self._batches = [batch for batch in self._batches if batch.rows]

    def recompute(self) -> None:
        """Drop the caches, because the weights changed. The next step computes all positions again."""
        self._batches = [_Batch(batch.rows, self._model) for batch in self._batches]


def _distribution(sampling: Sampling) -> tuple[float, float, int]:
    return sampling.temperature, sampling.top_p, sampling.top_k


def _padded_rows(own: Tensor | None, joining: Tensor | None, shifts: Sequence[int]) -> Tensor:
    """Concatenate cached states [b, heads, S, D], each padded (or cut) on the left of S."""
    assert own is not None and joining is not None
    return torch.cat([pad(part, (0, 0, shift, 0)) for part, shift in zip((own, joining), shifts, strict=True)])


def _append(response: Response, token: int, log_prob: float, version: int | None) -> None:
    """Append a token and set the finish reason if the response ends with it."""
    response.extend([token], [log_prob], version)
    if token in response.sampling.stop_token_ids:
        response.finish_reason = "stop"
    elif len(response.token_ids) == response.limit:
        response.finish_reason = "length"


def _left_pad(contexts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return [B, P] token ids and attention mask; contexts end in the last column."""
    width = max(len(context) for context in contexts)
    input_ids = torch.zeros(len(contexts), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, context in enumerate(contexts):
        input_ids[row, width - len(context) :] = torch.tensor(context)
        attention_mask[row, width - len(context) :] = 1
    return input_ids.to(device), attention_mask.to(device)
