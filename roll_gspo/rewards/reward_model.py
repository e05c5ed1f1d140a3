"""`reward_model`: score of a sequence classifier. The only shipped reward that imports torch."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.base import RewardOutput, RewardRequest

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NORMALIZATIONS = ("none", "sigmoid", "softmax")
Sample = list[tuple[int, int]]
"""(token id, token type id) of each position; models such as BERT use the type to separate prompt and response."""


class RewardModel:
    """Score prompt and response with a logit of `AutoModelForSequenceClassification`.

    Samples of a batch are padded on the right. The score of a sample does not depend on the others in its batch; see
    `_pad_token`.

    Args:
        model_name_or_path: Hugging Face name or folder of the model and its tokenizer.
        dtype: dtype of the parameters: `fp32`, `bf16` or `fp16`.
        device: `cpu`, `cuda` or `cuda:N`.
        max_length: maximum number of tokens of prompt and response. A longer sample keeps its last tokens, and its
            first one if that is a BOS or CLS token; the first truncation is logged. null: the lower of the model's
            `max_position_embeddings` and the tokenizer's `model_max_length`.
        chat: if True, the input is the classifier's chat template, applied to the messages of the prompt and the
            response. The messages are the column `messages` of the row; without it, the prompt text, including the
            policy's chat template, is one user message. If False, the input is the text pair (prompt, response). null:
            True if the tokenizer has a chat template.
        normalize: `none` for the logit, `sigmoid` of the logit, or `softmax` over all labels.
        label: index of the logit; required if the model has several labels.
        batch_size: samples per forward pass.
        num_threads: torch threads per worker process.

    Raises:
        ConfigError: an argument is wrong, the model cannot be loaded, or it has no trained classification head.
    """

    def __init__(
        self,
        model_name_or_path: str,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        device: str = "cpu",
        max_length: int | None = None,
        chat: bool | None = None,
        normalize: Literal["none", "sigmoid", "softmax"] = "none",
        label: int | None = None,
        batch_size: int = 16,
        num_threads: int = 1,
    ) -> None:
        if dtype not in _DTYPES or normalize not in _NORMALIZATIONS:
            raise ConfigError(
                f"reward_model: dtype is {dtype!r} and normalize {normalize!r}; use one of {', '.join(_DTYPES)} and "
                f"one of {', '.join(_NORMALIZATIONS)}"
            )
        if min(batch_size, num_threads, 1 if max_length is None else max_length) < 1:
            raise ConfigError(
                f"reward_model: batch_size ({batch_size}), num_threads ({num_threads}) and max_length ({max_length}) "
                "must be positive; raise them"
            )
        torch.set_num_threads(num_threads)
        self._device = _device(device)
        self._tokenizer = _tokenizer(model_name_or_path)
        self._model = _model(model_name_or_path, _DTYPES[dtype]).to(self._device)
        self._has_types = "token_type_ids" in inspect.signature(self._model.forward).parameters
        self._label = _label(label, normalize, self._model.config.num_labels)
        self._normalize = normalize
        self._batch_size = batch_size
        text_config = self._model.config.get_text_config()
        self._pad_token_id: int | None = text_config.pad_token_id
        # If positions start above 0, as in RoBERTa, the limit of the tokenizer is the lower one.
        positions = text_config.to_dict().get("max_position_embeddings") or self._tokenizer.model_max_length
        if max_length is not None and max_length > positions:
            raise ConfigError(
                f"reward_model: max_length ({max_length}) exceeds the model's {positions} positions; lower it"
            )
        self._max_length = max_length or min(positions, self._tokenizer.model_max_length)
        has_template = self._tokenizer.chat_template is not None
        if chat and not has_template:
            raise ConfigError("reward_model: chat is true, but the tokenizer has no chat template; set chat: false")
        self._chat = has_template if chat is None else chat
        self._has_truncated = False

    def __call__(self, prompt: str, response: str, ground_truth: str, **row: Any) -> RewardOutput:
        return self.score_batch([RewardRequest(prompt, response, ground_truth, row)])[0]

    def score_batch(self, requests: Sequence[RewardRequest]) -> list[RewardOutput]:
        """Return one output per request, in order."""
        samples = [self._encode(request) for request in requests]
        # Batches of similar lengths need little padding.
        order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
        scores: dict[int, float] = {}
        for start in range(0, len(order), self._batch_size):
            indices = order[start : start + self._batch_size]
            scores |= dict(zip(indices, self._forward([samples[i] for i in indices]), strict=True))
        return [RewardOutput(scores[i]) for i in range(len(requests))]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Sample]) -> list[float]:
        """Return the score of each sample of a batch."""
        padding = (self._pad_token(batch), 0)
        width = max(map(len, batch))
        padded = torch.tensor([[*s, *[padding] * (width - len(s))] for s in batch], device=self._device)  # [B, T, 2]
        lengths = torch.tensor([len(s) for s in batch], device=self._device)
        mask = (torch.arange(width, device=self._device) < lengths[:, None]).long()  # [B, T]
        types = {"token_type_ids": padded[..., 1]} if self._has_types else {}
        logits = self._model(input_ids=padded[..., 0], attention_mask=mask, **types).logits.float()  # [B, labels]
        if self._normalize == "softmax":
            logits = logits.softmax(-1)
        scores = logits[:, self._label]
        return (scores.sigmoid() if self._normalize == "sigmoid" else scores).tolist()

    def _pad_token(self, batch: Sequence[Sample]) -> int:
        """Return a padding token with which decoders find the last token of each sample.

        transformers reads the logit at the last token that is not `config.pad_token_id`. If that is unset, it reads the
        last position and refuses batches of several samples; in this case a token that the batch does not contain
        becomes the padding token.
        """
        if self._pad_token_id is not None:
            return self._pad_token_id
        used = {token for sample in batch for token, _ in sample}
        unused = next(i for i in range(len(used) + 1) if i not in used)
        self._model.config.get_text_config().pad_token_id = unused
        return unused

    def _encode(self, request: RewardRequest) -> Sample:
        if self._chat:
            messages = [*_messages(request), {"role": "assistant", "content": request.response}]
            encoded = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        else:
            encoded = self._tokenizer(request.prompt, request.response, return_token_type_ids=True)
        ids = encoded["input_ids"]
        sample = list(zip(ids, encoded.get("token_type_ids", [0] * len(ids)), strict=True))
        if not sample:
            raise ValueError("reward_model: prompt and response have no tokens")
        if len(sample) > self._max_length:
            if not self._has_truncated:
                self._has_truncated = True
                logger.warning(
                    "reward_model: a sample of %d tokens exceeds max_length %d; only its last tokens are scored",
                    len(ids), self._max_length,
                )  # fmt: skip
            # The head of an encoder reads the first token.
            start_tokens = (self._tokenizer.cls_token_id, self._tokenizer.bos_token_id)
            first = sample[:1] if ids[0] in start_tokens else []
            sample = [*first, *sample[len(sample) - self._max_length + len(first) :]]
        return sample


def _messages(request: RewardRequest) -> list[dict[str, str]]:
    messages = request.row.get("messages")
    if isinstance(messages, str):  # data files of ROLL store the list as JSON
        messages = json.loads(messages)
    if not messages:
        return [{"role": "user", "content": request.prompt}]
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"reward_model: messages must be a list of {{role, content}} objects, got {messages!r:.100}")
    return [dict(m) for m in messages]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"reward_model: device '{name}' is unknown; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"reward_model: device '{name}' does not exist ({count} GPUs found); use cpu or another GPU")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"reward_model: device '{name}' is not supported; use cpu, cuda or cuda:N")
    return device


def _tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward_model: cannot load a tokenizer from model_name_or_path '{name}': {error}") from error


def _model(name: str, dtype: torch.dtype) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
        model, loading_info = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward_model: cannot load model_name_or_path '{name}': {error}") from error
    if missing := sorted(loading_info["missing_keys"]):  # transformers would initialize them randomly
        raise ConfigError(
            f"reward_model: model_name_or_path '{name}' is no trained sequence classifier (it lacks "
            f"{', '.join(missing[:3])}); name one"
        )
    return model.eval()


def _label(label: int | None, normalize: str, num_labels: int) -> int:
    if label is None and num_labels > 1:
        raise ConfigError(f"reward_model: the model has {num_labels} labels; set label to 0 to {num_labels - 1}")
    if label is not None and not 0 <= label < num_labels:
        raise ConfigError(f"reward_model: label {label} is out of range; use 0 to {num_labels - 1}")
    if normalize == "softmax" and num_labels == 1:
        raise ConfigError("reward_model: normalize: softmax over a single label is always 1; use sigmoid or none")
    return label or 0
